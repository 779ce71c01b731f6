//! Makes the ordinary Linux target produce a freestanding image. The arguments are given here and not in
//! `.cargo/config.toml`, which cargo looks for in the current directory and not beside the manifest.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo");
    println!("cargo:rerun-if-changed=linker.ld");
    println!("cargo:rerun-if-changed=build.rs");
    let script = format!("-Wl,-T,{root}/linker.ld");
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n", &script] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
