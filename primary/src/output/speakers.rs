//! Which addresses the guest speaks from. The VMM gave the guest its MAC but not its IP address; a gratuitous ARP needs both, so the
//! pair is learnt from what the guest sends: ARP and IPv4 frames whose source is plain.

/// One address pair on one network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speaker {
    /// Which device.
    pub nic: u8,
    /// Ethernet source address.
    pub mac: [u8; 6],
    /// IPv4 source address.
    pub ipv4: [u8; 4],
}

/// Most pairs remembered; a guest that speaks from more has the oldest announced by RARP alone.
pub const SPEAKERS_MAX: usize = 16;

/// The pairs seen lately, the oldest first.
#[derive(Clone, Debug, Default)]
pub struct Speakers {
    seen: Vec<Speaker>,
}

impl Speakers {
    /// Starts from pairs that another side has seen.
    pub fn from_seen(mut seen: Vec<Speaker>) -> Self {
        seen.truncate(SPEAKERS_MAX);
        Self { seen }
    }

    /// Looks at a frame that the guest sends.
    pub fn look(&mut self, nic: u8, frame: &[u8]) {
        let Some(speaker) = source_of(nic, frame) else { return };
        if self.seen.contains(&speaker) {
            return;
        }
        if self.seen.len() == SPEAKERS_MAX {
            self.seen.remove(0);
        }
        self.seen.push(speaker);
    }

    /// All pairs.
    pub fn all(&self) -> Vec<Speaker> {
        self.seen.clone()
    }
}

fn source_of(nic: u8, frame: &[u8]) -> Option<Speaker> {
    let mac: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
    let ipv4: [u8; 4] = match frame.get(12..14)? {
        [0x08, 0x00] => frame.get(26..30)?.try_into().ok()?,
        [0x08, 0x06] => frame.get(28..32)?.try_into().ok()?,
        _ => return None,
    };
    (ipv4 != [0; 4] && mac[0] & 1 == 0).then_some(Speaker { nic, mac, ipv4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4_frame(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
        let mut f = vec![0xff; 6];
        f.extend_from_slice(&mac);
        f.extend_from_slice(&[8, 0]);
        f.extend_from_slice(&[0; 12]);
        f.extend_from_slice(&ip);
        f.extend_from_slice(&[0; 4]);
        f
    }

    #[test]
    fn learns_each_pair_once_and_forgets_the_oldest() {
        let mut s = Speakers::default();
        for i in 0..20 {
            for _ in 0..2 {
                s.look(0, &ipv4_frame([2, 0, 0, 0, 0, 1], [10, 0, 0, i]));
            }
        }
        assert_eq!(s.all().len(), SPEAKERS_MAX);
        assert_eq!(s.all()[0].ipv4, [10, 0, 0, 4]);
    }

    #[test]
    fn short_multicast_and_unset_sources_are_not_speakers() {
        let mut s = Speakers::default();
        s.look(0, &[0; 11]);
        s.look(0, &ipv4_frame([3, 0, 0, 0, 0, 1], [10, 0, 0, 1]));
        s.look(0, &ipv4_frame([2, 0, 0, 0, 0, 1], [0; 4]));
        assert!(s.all().is_empty());
    }
}
