//! Tells the guest LAN where the guest is now: gratuitous ARP for every address pair that the guest speaks from, RARP for every MAC,
//! repeated for a few seconds because the first ones may be lost while switches and cables settle (rule R8).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::output::Gate;
use crate::output::queue::Mode;
use crate::output::speakers::Speaker;

/// When the announcement is made, counted from the activation.
const SCHEDULE_MS: [u64; 8] = [0, 50, 150, 300, 600, 1_000, 2_000, 4_000];

/// How long the announcer sleeps at a time: a process that was stopped shows by a sleep that was far longer than this.
const NAP: Duration = Duration::from_millis(20);
/// A nap that took so much longer means that this process did not run.
const OVERSLEPT: Duration = Duration::from_millis(80);
/// After that nothing is announced for so long. The other side may have taken over meanwhile, and the decision core, which has slept as
/// long, needs a moment to find out; the gate falls silent then.
const WARY: Duration = Duration::from_millis(200);

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;

/// The frames of one announcement.
pub fn frames(macs: &[[u8; 6]], speakers: &[Speaker]) -> Vec<(u8, Vec<u8>)> {
    let rarp = macs.iter().zip(0u8..).map(|(mac, nic)| (nic, arp_frame(ETHERTYPE_RARP, RARP_REQUEST, *mac, [0; 4])));
    let arp = speakers.iter().map(|s| (s.nic, arp_frame(ETHERTYPE_ARP, ARP_REQUEST, s.mac, s.ipv4)));
    rarp.chain(arp).collect()
}

/// Announces at once, and again on a thread of its own for a few seconds or until the gate falls silent.
///
/// # Errors
/// No thread could be started; the first announcement has been made all the same.
pub fn announce(gate: &Arc<Gate>, macs: &[[u8; 6]], speakers: &[Speaker]) -> std::io::Result<()> {
    let frames = frames(macs, speakers);
    let say = |gate: &Gate| frames.iter().for_each(|(nic, frame)| gate.send_for_guest(*nic, frame));
    say(gate);
    let (gate, repeated) = (Arc::clone(gate), frames.clone());
    std::thread::Builder::new().name("ft-announce".into()).spawn(move || repeat(&gate, &repeated))?;
    Ok(())
}

/// The later announcements. One made by a side that has lost the guest would lead its frames astray until the new owner speaks again.
fn repeat(gate: &Gate, frames: &[(u8, Vec<u8>)]) {
    let began = Instant::now();
    let mut sleep = Sleep::default();
    for due in SCHEDULE_MS.into_iter().skip(1).map(Duration::from_millis) {
        loop {
            let now = began.elapsed();
            let left = due.saturating_sub(now);
            if left.is_zero() {
                break;
            }
            let nap = left.min(NAP);
            std::thread::sleep(nap);
            sleep.napped(nap, now, began.elapsed());
        }
        for (nic, frame) in frames {
            let lets_out = matches!(gate.mode(), Mode::Open | Mode::OnCommit);
            if lets_out && sleep.is_awake(began.elapsed()) {
                gate.send_for_guest(*nic, frame);
            }
        }
    }
}

/// Whether this process has run without a longer interruption.
#[derive(Default)]
struct Sleep {
    last: Duration,
    overslept_at: Option<Duration>,
}

impl Sleep {
    /// A nap of `meant` is over, which began at `from`.
    fn napped(&mut self, meant: Duration, from: Duration, now: Duration) {
        if now.saturating_sub(from) > meant + OVERSLEPT {
            self.overslept_at = Some(now);
        }
        self.last = now;
    }

    /// Whether what was known at the end of the last nap still counts.
    fn is_awake(&self, now: Duration) -> bool {
        let stopped_since = now.saturating_sub(self.last) > OVERSLEPT;
        !stopped_since && self.overslept_at.is_none_or(|at| now.saturating_sub(at) >= WARY)
    }
}

/// An ARP or RARP request about the sender itself (RFC 826, RFC 903; gratuitous: RFC 5227), padded to the least Ethernet length.
fn arp_frame(ethertype: u16, operation: u16, mac: [u8; 6], ipv4: [u8; 4]) -> Vec<u8> {
    let target = if ethertype == ETHERTYPE_RARP { mac } else { [0; 6] };
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&ipv4);
    frame.extend_from_slice(&target);
    frame.extend_from_slice(&ipv4);
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_was_stopped_says_nothing_for_a_while() {
        let ms = Duration::from_millis;
        let mut sleep = Sleep::default();
        sleep.napped(NAP, ms(0), ms(25));
        assert!(sleep.is_awake(ms(26)));
        assert!(!sleep.is_awake(ms(2_000)), "stopped after the nap");
        // Stopped during a nap that ends just when an announcement is due.
        sleep.napped(NAP, ms(30), ms(4_000));
        assert!(!sleep.is_awake(ms(4_000)));
        for from in (4_000..4_200).step_by(20) {
            sleep.napped(NAP, ms(from), ms(from + 20));
        }
        assert!(sleep.is_awake(ms(4_200)));
    }

    #[test]
    fn one_rarp_for_each_card_and_one_arp_for_each_speaker() {
        let mac = [2, 0, 0, 0, 0, 7];
        let all = frames(&[mac], &[Speaker { nic: 0, mac, ipv4: [10, 0, 0, 9] }]);
        assert_eq!(all.len(), 2);
        let (rarp, arp) = (&all[0].1, &all[1].1);
        assert_eq!(rarp.len(), 60);
        assert_eq!(&rarp[..14], [&[0xff; 6][..], &mac, &[0x80, 0x35]].concat());
        assert_eq!(&rarp[32..38], mac);
        assert_eq!(&arp[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(&arp[28..32], [10, 0, 0, 9], "sender");
        assert_eq!(&arp[38..42], [10, 0, 0, 9], "target: itself");
    }
}
