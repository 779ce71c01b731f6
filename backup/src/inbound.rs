//! Copies of the frames that reached the guest in epochs that are not committed yet. A new owner delivers them; see
//! `primary::mirror` for why. Pure.

use std::collections::VecDeque;

use bytes::Bytes;
use replication_proto::Epoch;

/// Most frames kept; of more, the oldest are dropped and left to retransmission.
const FRAMES_MAX: usize = 1_024;
/// Most bytes kept.
const BYTES_MAX: usize = 2 << 20;

/// Frames that wait for their epoch's commit.
#[derive(Debug, Default)]
pub struct Inbound {
    frames: VecDeque<(Epoch, u8, Bytes)>,
    bytes: usize,
}

impl Inbound {
    /// A frame reached the guest in `epoch`.
    pub fn keep(&mut self, epoch: Epoch, nic: u8, frame: &[u8]) {
        // A copy: the frame is a part of a large receive buffer that it would keep alive.
        self.frames.push_back((epoch, nic, Bytes::copy_from_slice(frame)));
        self.bytes += frame.len();
        while self.frames.len() > FRAMES_MAX || self.bytes > BYTES_MAX {
            self.drop_oldest();
        }
    }

    /// `epoch` is committed: what arrived until then is in the guest's memory.
    pub fn committed(&mut self, epoch: Epoch) {
        while self.frames.front().is_some_and(|(of, ..)| *of <= epoch) {
            self.drop_oldest();
        }
    }

    /// A new base begins: what was kept belongs to another state.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What a new owner delivers to network device `nic`, in the order of arrival.
    pub fn of(&self, nic: u8) -> Vec<Vec<u8>> {
        self.frames.iter().filter(|(_, of, _)| *of == nic).map(|(.., frame)| frame.to_vec()).collect()
    }

    fn drop_oldest(&mut self) {
        if let Some((.., frame)) = self.frames.pop_front() {
            self.bytes -= frame.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_committed_epochs_are_forgotten_and_the_rest_keep_their_order() {
        let mut kept = Inbound::default();
        for (epoch, tag) in [(3, 1), (3, 2), (4, 3), (5, 4)] {
            kept.keep(Epoch(epoch), 0, &[tag]);
        }
        kept.keep(Epoch(5), 1, &[9]);
        kept.committed(Epoch(3));
        assert_eq!(kept.of(0), [[3], [4]]);
        assert_eq!(kept.of(1), [[9]]);
        kept.clear();
        assert!(kept.of(0).is_empty());
    }

    #[test]
    fn a_flood_drops_the_oldest() {
        let mut kept = Inbound::default();
        for n in 0..FRAMES_MAX + 1 {
            kept.keep(Epoch(1), 0, &n.to_le_bytes());
        }
        assert_eq!(kept.of(0).len(), FRAMES_MAX);
        assert_eq!(kept.of(0)[0], 1usize.to_le_bytes());
        kept.keep(Epoch(2), 0, &vec![0; BYTES_MAX]);
        assert_eq!(kept.of(0).len(), 1);
        kept.committed(Epoch(2));
        assert_eq!(kept.bytes, 0);
    }
}
