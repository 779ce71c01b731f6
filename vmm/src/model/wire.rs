//! Ethernet, ARP, IPv4, ICMP, UDP and TCP as bytes: what comes in is checked, what goes out is complete.

/// A station: its Ethernet and its IPv4 address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Station {
    pub(super) mac: [u8; 6],
    pub(super) ip: [u8; 4],
}

/// TCP's control bits.
pub(super) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const PSH: u8 = 8;
    pub(crate) const ACK: u8 = 16;
}

/// A TCP segment, in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) source: u16,
    pub(super) target: u16,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// The option of that name.
    pub(super) mss: Option<u16>,
    pub(super) payload: &'a [u8],
}

impl Segment<'_> {
    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// A frame that concerns the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet<'a> {
    /// Somebody asks for our address.
    ArpRequest(Station),
    /// Somebody pings: the ICMP message.
    Echo(Station, &'a [u8]),
    /// TCP, to whatever port.
    Tcp(Station, Segment<'a>),
}

const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, lengths 6 and 4, as in every ARP packet of an Ethernet LAN.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const BROADCAST: [u8; 6] = [0xff; 6];

fn chunk<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    chunk(bytes, at).map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    chunk(bytes, at).map(u32::from_be_bytes)
}

/// The Internet checksum over several pieces, each but the last of even length.
fn checksum(pieces: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for piece in pieces {
        let mut words = piece.chunks_exact(2);
        for word in &mut words {
            sum += u64::from(word[0]) << 8 | u64::from(word[1]);
        }
        if let [last] = words.remainder() {
            sum += u64::from(*last) << 8;
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

fn pseudo_header(from: [u8; 4], to: [u8; 4], protocol: u8, length: usize) -> [u8; 12] {
    let [a, b, c, d] = from;
    let [e, f, g, h] = to;
    let [l0, l1] = length16(length).to_be_bytes();
    [a, b, c, d, e, f, g, h, 0, protocol, l0, l1]
}

/// A length that a frame's own bounds keep below 64 KiB.
fn length16(length: usize) -> u16 {
    u16::try_from(length).expect("a packet that the program builds fits into a frame")
}

/// Reads a frame. `None` for everything that is not for us or not in order.
pub(super) fn parse(frame: &[u8], us: Station) -> Option<Packet<'_>> {
    let target: [u8; 6] = chunk(frame, 0)?;
    if target != us.mac && target != BROADCAST {
        return None;
    }
    let mac = chunk(frame, 6)?;
    let body = frame.get(14..)?;
    match chunk::<2>(frame, 12)? {
        TYPE_ARP => {
            let request = chunk::<8>(body, 0)? == [0, 1, 8, 0, 6, 4, 0, 1];
            let sender = Station { mac: chunk(body, 8)?, ip: chunk(body, 14)? };
            (request && chunk(body, 24)? == us.ip).then_some(Packet::ArpRequest(sender))
        }
        TYPE_IPV4 => parse_ipv4(body, mac, us),
        _ => None,
    }
}

fn parse_ipv4(packet: &[u8], mac: [u8; 6], us: Station) -> Option<Packet<'_>> {
    let first = *packet.first()?;
    let (header_length, total) = (usize::from(first & 15) * 4, usize::from(be16(packet, 2)?));
    let header = packet.get(..header_length)?;
    let fragment = be16(packet, 6)? & 0x3fff != 0;
    if first >> 4 != 4 || header_length < 20 || total < header_length || fragment || checksum(&[header]) != 0 {
        return None;
    }
    let (ip, to): ([u8; 4], [u8; 4]) = (chunk(packet, 12)?, chunk(packet, 16)?);
    if to != us.ip {
        return None;
    }
    let body = packet.get(header_length..total)?;
    let from = Station { mac, ip };
    match *packet.get(9)? {
        ICMP => (body.len() >= 8 && body[..2] == [8, 0] && checksum(&[body]) == 0).then_some(Packet::Echo(from, body)),
        TCP => {
            let pseudo = pseudo_header(ip, us.ip, TCP, body.len());
            if checksum(&[&pseudo, body]) != 0 {
                return None;
            }
            parse_tcp(body).map(|segment| Packet::Tcp(from, segment))
        }
        _ => None,
    }
}

fn parse_tcp(bytes: &[u8]) -> Option<Segment<'_>> {
    let header_length = usize::from(*bytes.get(12)? >> 4) * 4;
    let options = bytes.get(20..header_length)?;
    Some(Segment {
        source: be16(bytes, 0)?,
        target: be16(bytes, 2)?,
        sequence: be32(bytes, 4)?,
        acknowledged: be32(bytes, 8)?,
        flags: *bytes.get(13)?,
        window: be16(bytes, 14)?,
        mss: parse_mss(options),
        payload: bytes.get(header_length..)?,
    })
}

fn parse_mss(mut options: &[u8]) -> Option<u16> {
    loop {
        match options {
            [1, rest @ ..] => options = rest,
            [2, 4, high, low, ..] => return Some(u16::from_be_bytes([*high, *low])),
            [kind, length, ..] if *kind != 0 && *length >= 2 => options = options.get(usize::from(*length)..)?,
            _ => return None,
        }
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: [u8; 2], capacity: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(14 + capacity);
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&kind);
    frame
}

fn ipv4(us: Station, to: Station, protocol: u8, body_length: usize) -> Vec<u8> {
    let mut frame = ethernet(to.mac, us.mac, TYPE_IPV4, 20 + body_length);
    let [l0, l1] = length16(20 + body_length).to_be_bytes();
    // Do not fragment, so that the identification may be 0 (RFC 6864).
    let mut header = [0x45, 0, l0, l1, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[12..16].copy_from_slice(&us.ip);
    header[16..20].copy_from_slice(&to.ip);
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&header);
    frame
}

/// The answer to [`Packet::ArpRequest`].
pub(super) fn arp_reply(us: Station, to: Station) -> Vec<u8> {
    let mut frame = ethernet(to.mac, us.mac, TYPE_ARP, 46);
    frame.extend_from_slice(&ARP_HEAD);
    frame.extend_from_slice(&[0, 2]);
    for station in [us, to] {
        frame.extend_from_slice(&station.mac);
        frame.extend_from_slice(&station.ip);
    }
    frame
}

/// The answer to [`Packet::Echo`].
pub(super) fn echo_reply(us: Station, to: Station, message: &[u8]) -> Vec<u8> {
    let mut frame = ipv4(us, to, ICMP, message.len());
    let start = frame.len();
    frame.extend_from_slice(message);
    frame[start..start + 4].fill(0);
    let sum = checksum(&[&frame[start..]]);
    frame[start + 2..start + 4].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// A UDP broadcast.
pub(super) fn broadcast(us: Station, port: u16, payload: &[u8]) -> Vec<u8> {
    let everybody = Station { mac: BROADCAST, ip: [255; 4] };
    let length = 8 + payload.len();
    let mut frame = ipv4(us, everybody, UDP, length);
    let start = frame.len();
    for half in [port, port, length16(length), 0] {
        frame.extend_from_slice(&half.to_be_bytes());
    }
    frame.extend_from_slice(payload);
    let pseudo = pseudo_header(us.ip, everybody.ip, UDP, length);
    // A sum of zero is written as its other form: zero means that there is none.
    let sum = match checksum(&[&pseudo, &frame[start..]]) {
        0 => u16::MAX,
        sum => sum,
    };
    frame[start + 6..start + 8].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// A TCP segment as a frame.
pub(super) fn tcp(us: Station, to: Station, segment: &Segment<'_>) -> Vec<u8> {
    let Segment { source, target, sequence, acknowledged, flags, window, mss, payload } = *segment;
    let header_length: u8 = if mss.is_some() { 24 } else { 20 };
    let length = usize::from(header_length) + payload.len();
    let mut frame = ipv4(us, to, TCP, length);
    let start = frame.len();
    frame.extend_from_slice(&source.to_be_bytes());
    frame.extend_from_slice(&target.to_be_bytes());
    frame.extend_from_slice(&sequence.to_be_bytes());
    frame.extend_from_slice(&acknowledged.to_be_bytes());
    frame.extend_from_slice(&[header_length << 2, flags]);
    frame.extend_from_slice(&window.to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    if let Some(mss) = mss {
        frame.extend_from_slice(&[2, 4]);
        frame.extend_from_slice(&mss.to_be_bytes());
    }
    frame.extend_from_slice(payload);
    let pseudo = pseudo_header(us.ip, to.ip, TCP, length);
    let sum = checksum(&[&pseudo, &frame[start..]]);
    frame[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Station = Station { mac: [2, 0, 0, 0, 0, 1], ip: [10, 0, 0, 1] };
    const PEER: Station = Station { mac: [2, 0, 0, 0, 0, 2], ip: [10, 0, 0, 2] };

    fn segment(payload: &[u8]) -> Segment<'_> {
        let mss = Some(1460);
        let flags = flag::ACK | flag::PSH;
        Segment { source: 1, target: 2, sequence: 3, acknowledged: 4, flags, window: 5, mss, payload }
    }

    #[test]
    fn tcp_is_read_as_it_was_written() {
        for payload in [&b""[..], b"odd", b"even"] {
            let segment = segment(payload);
            let frame = tcp(PEER, US, &segment);
            assert_eq!(parse(&frame, US), Some(Packet::Tcp(PEER, segment)));
        }
    }

    #[test]
    fn a_changed_or_cut_frame_is_never_a_segment() {
        let frame = tcp(PEER, US, &segment(b"payload"));
        for cut in 0..frame.len() {
            assert_eq!(parse(&frame[..cut], US), None, "cut at {cut}");
        }
        // From the IP header on everything is under a checksum but the type of service and so on, which are under the header's.
        for byte in 14..frame.len() {
            for bit in 0..8 {
                let mut changed = frame.clone();
                changed[byte] ^= 1 << bit;
                assert_eq!(parse(&changed, US), None, "byte {byte} bit {bit}");
            }
        }
    }

    #[test]
    fn echo_is_answered_with_a_right_checksum() {
        let mut ping = ipv4(PEER, US, ICMP, 12);
        ping.extend_from_slice(&[8, 0, 0, 0, 1, 2, 3, 4, 9, 9, 9, 9]);
        let sum = checksum(&[&ping[34..]]);
        ping[36..38].copy_from_slice(&sum.to_be_bytes());
        let Some(Packet::Echo(from, message)) = parse(&ping, US) else { panic!("a ping") };
        let reply = echo_reply(US, from, message);
        assert_eq!(&reply[34..36], [0, 0]);
        assert_eq!(checksum(&[&reply[34..]]), 0);
        assert_eq!(&reply[38..], &message[4..]);
    }
}
