//! Bytes on their way into a socket. A checkpoint is many small frames and a few large ones: one call of the kernel takes them together, so that they neither
//! become a packet each nor wake the other side for each of them.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

use bytes::{Buf as _, Bytes};

/// Frames that one call takes at most.
const FRAMES_AT_ONCE: usize = 32;
/// No more frames are added to so many bytes.
const BYTES_AT_ONCE: usize = 512 << 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Outgoing {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Outgoing {
    /// Takes frames from `next` until there are enough for one call.
    pub fn fill(&mut self, mut next: impl FnMut() -> Option<Bytes>) {
        while self.frames.len() < FRAMES_AT_ONCE && self.bytes < BYTES_AT_ONCE {
            let Some(frame) = next() else { return };
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    /// Bytes that the socket has not taken.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the socket has taken everything.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Offers everything to the socket, once. Returns how many bytes it took.
    ///
    /// # Errors
    /// As the socket's; [`io::ErrorKind::WriteZero`] if it takes nothing and does not say why.
    pub fn write_to(&mut self, socket: &mut impl Write) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); FRAMES_AT_ONCE];
        slices.iter_mut().zip(&self.frames).for_each(|(slice, frame)| *slice = IoSlice::new(frame));
        let taken = socket.write_vectored(&slices[..self.frames.len()])?;
        if taken == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes -= taken;
        let mut left = taken;
        while let Some(first) = self.frames.front_mut() {
            let of_first = left.min(first.len());
            first.advance(of_first);
            left -= of_first;
            if first.has_remaining() {
                break;
            }
            self.frames.pop_front();
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes so many bytes of each call.
    struct Narrow {
        takes: Vec<usize>,
        took: Vec<u8>,
    }

    impl Write for Narrow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(bytes)])
        }

        fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let takes = self.takes.pop().unwrap_or(usize::MAX).min(bytes.len());
            self.took.extend_from_slice(&bytes[..takes]);
            Ok(takes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn every_byte_leaves_once_and_in_order(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..120),
            takes in prop::collection::vec(1..2_000usize, 0..60),
        ) {
            let (mut outgoing, mut socket) = (Outgoing::default(), Narrow { takes, took: Vec::new() });
            let mut next = frames.iter().map(|frame| Bytes::copy_from_slice(frame));
            loop {
                outgoing.fill(|| next.next());
                if outgoing.is_empty() {
                    break;
                }
                let (before, taken) = (outgoing.len(), outgoing.write_to(&mut socket).unwrap());
                prop_assert_eq!(outgoing.len(), before - taken);
            }
            prop_assert_eq!((outgoing.len(), socket.took), (0, frames.concat()));
        }
    }

    #[test]
    fn a_socket_that_takes_nothing_is_an_error() {
        let mut outgoing = Outgoing::default();
        outgoing.fill(|| Some(Bytes::from_static(b"frame")));
        assert_eq!(outgoing.frames.len(), FRAMES_AT_ONCE);
        let mut socket = Narrow { takes: vec![0], took: Vec::new() };
        assert_eq!(outgoing.write_to(&mut socket).unwrap_err().kind(), io::ErrorKind::WriteZero);
    }
}
