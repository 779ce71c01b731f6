//! A tap as the machine's port: frames both ways, and each refusal told apart. In a namespace of its own.

use std::io::ErrorKind;
use std::net::UdpSocket;

use tests::real::netns::NetNs;
use vmm::{FramePort, Tap, TapError};

const UDP: u8 = 17;

/// Length of an Ethernet header, and where IPv4 says what it carries.
const PROTOCOL_AT: usize = 14 + 9;

#[test]
fn tap_carries_frames_and_tells_its_refusals_apart() {
    let ns = NetNs::new("tap").expect("a network namespace (root, or user namespaces, are needed)");
    let tap = ns.run(|| Tap::open("ft0")).expect("a tap in a namespace of our own");
    assert_eq!(tap.name(), "ft0");
    assert!(matches!(ns.run(|| Tap::open("ft0")), Err(TapError::Busy { .. })), "open twice");
    assert!(matches!(ns.run(|| Tap::open("lo")), Err(TapError::NotATap { .. })), "no tap");
    assert!(tap.send(&[0; 60]).is_err(), "a tap that is down takes nothing");

    let mut buffer = [0; 2048];
    assert_eq!(tap.receive(&mut buffer).expect("an idle tap"), None);
    // A neighbour that needs no ARP.
    ns.ip("addr add 10.1.0.1/24 dev ft0\nlink set ft0 up\nneigh add 10.1.0.2 lladdr 02:00:00:00:00:02 dev ft0 nud permanent\n")
        .expect("the tap gets an address");
    let socket = ns.run(|| UdpSocket::bind("10.1.0.1:4000")).expect("a socket");
    socket.send_to(b"out", "10.1.0.2:5000").expect("a datagram");
    let length = loop {
        // The kernel may say something of its own first (IGMP).
        let length = tap.receive(&mut buffer).expect("a tap that is up").expect("a frame that waits");
        if buffer[PROTOCOL_AT] == UDP {
            break length;
        }
    };
    assert_eq!(&buffer[length - 3..length], b"out");
    assert_eq!(buffer[..6], [2, 0, 0, 0, 0, 2]);

    // The same datagram turned round: addresses and ports exchanged, which changes no checksum.
    let mut answer = buffer[..length].to_vec();
    let (ours, theirs) = (answer[6..12].to_vec(), answer[..6].to_vec());
    answer[..6].copy_from_slice(&ours);
    answer[6..12].copy_from_slice(&theirs);
    for (low, high, size) in [(26, 30, 4), (34, 36, 2)] {
        for i in 0..size {
            answer.swap(low + i, high + i);
        }
    }
    tap.send(&answer).expect("a tap that is up takes frames");
    socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("a timeout");
    let mut got = [0; 16];
    let (n, from) = socket.recv_from(&mut got).expect("the datagram came back");
    assert_eq!((&got[..n], from.to_string().as_str()), (&b"out"[..], "10.1.0.2:5000"));
    drop(tap);
    assert!(ns.run(|| Tap::open("ft0")).is_ok(), "closed, it is free again");
}

/// Without rights to the network, opening is refused as such, not as a missing device.
#[test]
fn tap_without_permission_says_so() {
    let outcome = std::thread::spawn(|| {
        // Of this thread only: a namespace of somebody else's would be needed otherwise.
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .expect("a thread may give up its rights");
        Tap::open("ft-none")
    })
    .join()
    .expect("the thread does not panic");
    match outcome {
        Err(TapError::Permission { source, .. }) => assert_eq!(source.kind(), ErrorKind::PermissionDenied),
        other => panic!("{other:?}"),
    }
}
