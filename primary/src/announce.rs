//! Tells the guest LAN where the guest is now: gratuitous ARP for every address pair that the guest speaks from, RARP for every MAC,
//! repeated for a few seconds because the first ones may be lost while switches and cables settle (rule R8).

use std::sync::Arc;
use std::time::Duration;

use crate::output::Gate;
use crate::output::speakers::Speaker;

/// When the announcement is made, counted from the activation.
const SCHEDULE_MS: [u64; 8] = [0, 50, 150, 300, 600, 1_000, 2_000, 4_000];

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
    std::thread::Builder::new().name("ft-announce".into()).spawn(move || {
        for pause in SCHEDULE_MS.windows(2) {
            std::thread::sleep(Duration::from_millis(pause[1] - pause[0]));
            repeated.iter().for_each(|(nic, frame)| gate.send_for_guest(*nic, frame));
        }
    })?;
    Ok(())
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
