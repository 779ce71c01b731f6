//! zstd with bounds. The decoder takes exactly one plain frame whose header says exactly the size that was announced, with a small window,
//! no dictionary and nothing after it; so a peer's bytes never decide how much memory is used.

use core::fmt;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

use crate::error::Malformed;
use crate::limits::{MAX_PAYLOAD_BYTES, ZSTD_LEVEL, ZSTD_WINDOW_LOG_MAX};
use crate::wire::codec::wide;

const MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

/// Compresses if that saves something.
pub(crate) struct Encoder(Compressor<'static>);

impl Encoder {
    pub(crate) fn new() -> Self {
        // Creating a context fails only when memory is used up.
        Self(Compressor::new(ZSTD_LEVEL).expect("memory for a compression context"))
    }

    /// `bytes` compressed, or `None` if that is not smaller by an eighth: the reader's time is worth more.
    pub(crate) fn encode(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(bytes.len() - bytes.len() / 8);
        // Fails when the result does not fit the room, which is the question here.
        self.0.compress_to_buffer(bytes, &mut out).ok()?;
        Some(out)
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encoder")
    }
}

pub(crate) struct Decoder(Decompressor<'static>);

impl Decoder {
    pub(crate) fn new() -> Self {
        Self(Decompressor::new().expect("memory for a decompression context"))
    }

    /// Exactly `size` bytes out of `bytes`.
    pub(crate) fn decode(&mut self, bytes: &[u8], size: usize) -> Result<Vec<u8>, Malformed> {
        assert!(size <= MAX_PAYLOAD_BYTES, "the caller bounds the size");
        check_frame(bytes, size)?;
        let mut out = Vec::with_capacity(size);
        let refused = Malformed::Zstd { why: "it does not decode to the announced size" };
        match self.0.decompress_to_buffer(bytes, &mut out) {
            Ok(written) if written == size => Ok(out),
            Ok(_) | Err(_) => Err(refused),
        }
    }
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

/// Reads the frame header (RFC 8878, section 3.1.1.1) before the library does.
fn check_frame(bytes: &[u8], size: usize) -> Result<(), Malformed> {
    let refuse = |why| Err(Malformed::Zstd { why });
    let Some((&magic, rest)) = bytes.split_first_chunk::<4>() else { return refuse("too short") };
    if magic != MAGIC {
        return refuse("not a plain frame");
    }
    let Some((&descriptor, rest)) = rest.split_first() else { return refuse("too short") };
    if descriptor & 0b0000_1000 != 0 {
        return refuse("a reserved bit is set");
    }
    if descriptor & 0b0000_0011 != 0 {
        return refuse("it needs a dictionary");
    }
    let single_segment = descriptor & 0b0010_0000 != 0;
    if !single_segment {
        let Some(&window) = rest.first() else { return refuse("too short") };
        // Exponent in the upper five bits; a mantissa of 0 to 7 eighths is added to the power of 2.
        let log = 10 + u32::from(window >> 3);
        if log > ZSTD_WINDOW_LOG_MAX || log == ZSTD_WINDOW_LOG_MAX && window & 7 != 0 {
            return refuse("its window is too large");
        }
    }
    match zstd_safe::get_frame_content_size(bytes) {
        Ok(Some(content)) if content == wide(size) => {}
        _ => return refuse("its content is not of the announced size"),
    }
    match zstd_safe::find_frame_compressed_size(bytes) {
        Ok(length) if length == bytes.len() => Ok(()),
        _ => refuse("it is cut short or something follows it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(content: &[u8]) -> Vec<u8> {
        zstd::bulk::compress(content, ZSTD_LEVEL).unwrap()
    }

    fn refused(bytes: &[u8], size: usize) -> &'static str {
        match Decoder::new().decode(bytes, size) {
            Err(Malformed::Zstd { why }) => why,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn what_is_encoded_decodes_and_what_does_not_shrink_is_left() {
        let content = b"abcd".repeat(1000);
        let encoded = Encoder::new().encode(&content).unwrap();
        assert!(encoded.len() < 100);
        assert_eq!(Decoder::new().decode(&encoded, content.len()), Ok(content));
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state.to_be_bytes()[0]
            })
            .collect();
        assert_eq!(Encoder::new().encode(&noise), None);
    }

    /// Corpus row 14.
    #[test]
    fn bombs_and_lies_about_the_size_are_refused() {
        let bomb = frame(&vec![0; 16 << 20]);
        assert!(bomb.len() < 4096);
        assert_eq!(refused(&bomb, 4096), "its content is not of the announced size");
        let good = frame(&[7; 4096]);
        assert_eq!(refused(&good, 4095), "its content is not of the announced size");
        assert_eq!(refused(&good, 4097), "its content is not of the announced size");
        // The header's own size field lies, in both directions: 4 bytes wide, or 2 bytes minus 256.
        let descriptor = good[4];
        assert_eq!(descriptor >> 6, 1, "a two-byte size field, else this test flips something else");
        let size_at = if descriptor & 0x20 == 0 { 6 } else { 5 };
        for lie in [-1i32, 1, 100] {
            let mut lying = good.clone();
            let told = u16::try_from(4096 - 256 + lie).unwrap();
            lying[size_at..size_at + 2].copy_from_slice(&told.to_le_bytes());
            assert_eq!(
                refused(&lying, usize::try_from(4096 + lie).unwrap()),
                "it does not decode to the announced size"
            );
        }
    }

    /// Corpus row 14.
    #[test]
    fn anything_but_one_plain_frame_is_refused() {
        let good = frame(&[7; 4096]);
        let and = |more: &[u8]| [&good[..], more].concat();
        assert_eq!(refused(&and(&good), 4096), "it is cut short or something follows it");
        assert_eq!(refused(&and(&[0]), 4096), "it is cut short or something follows it");
        let skippable = [&0x184D_2A50_u32.to_le_bytes()[..], &4u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(refused(&[&skippable[..], &good].concat(), 4096), "not a plain frame");
        assert_eq!(refused(&and(&skippable), 4096), "it is cut short or something follows it");
        for legacy in [0xFD2F_B524_u32, 0xFD2F_B525, 0xFD2F_B526, 0xFD2F_B527] {
            assert_eq!(refused(&[&legacy.to_le_bytes()[..], &good[4..]].concat(), 4096), "not a plain frame");
        }
        let mut dictionary = good.clone();
        dictionary[4] |= 1;
        assert_eq!(refused(&dictionary, 4096), "it needs a dictionary");
        let mut reserved = good.clone();
        reserved[4] |= 8;
        assert_eq!(refused(&reserved, 4096), "a reserved bit is set");
        for cut in 0..good.len() {
            refused(&good[..cut], 4096);
        }
        assert_eq!(refused(&[], 0), "too short");
    }

    /// Corpus row 14: a window of 2^31 in a frame of a few bytes.
    #[test]
    fn large_windows_are_refused() {
        // Magic, descriptor (two-byte size, window given), window, size 4096, one last raw block of no bytes.
        let with_window = |window: u8| [&MAGIC[..], &[0x40, window], &3840u16.to_le_bytes(), &[1, 0, 0]].concat();
        for window in [21 << 3, (11 << 3) | 1, 12 << 3] {
            assert_eq!(refused(&with_window(window), 4096), "its window is too large");
        }
        assert_eq!(refused(&with_window(11 << 3), 4096), "it does not decode to the announced size");
    }
}
