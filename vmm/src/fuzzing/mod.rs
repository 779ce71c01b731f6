//! What the fuzz targets do to the decoders of saved state and to the devices, without KVM: bytes in, a panic when a rule is broken.
//!
//! Only in tests and under cargo-fuzz (which sets `cfg(fuzzing)`): these decoders are private, and have no business outside of this
//! crate. The tests below replay what the fuzzer once found, and the seeds.

mod bench;
mod block;
mod net;
mod sections;

pub use block::virtio_blk;
pub use net::virtio_net;
pub use sections::sections;

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// What one target does with one input.
    type Body = fn(&[u8]);

    const TARGETS: [(&str, Body); 3] =
        [("sections", super::sections), ("virtio_net", super::virtio_net), ("virtio_blk", super::virtio_blk)];

    fn replay(folder: &Path, body: Body) -> usize {
        let Ok(files) = std::fs::read_dir(folder) else { return 0 };
        let mut replayed = 0;
        for file in files {
            let path = file.unwrap().path();
            eprintln!("{}", path.display());
            body(&std::fs::read(&path).unwrap());
            replayed += 1;
        }
        replayed
    }

    #[test]
    fn corpus_seeds_and_regressions_break_no_rule() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/corpus");
        for (name, body) in TARGETS {
            let seeds = replay(&corpus.join(name), body);
            assert!(seeds > 0, "no seeds for {name}");
            replay(&corpus.join("regressions").join(name), body);
        }
    }
}
