//! Both ends of a heartbeat connection, with a virtual clock.

use core::time::Duration;

use crate::support::{self, Forge, HEARTBEAT, backup, drain, primary};
use replication_proto::{
    Channel, Epoch, Generation, GoodbyeReason, Greeting, HeartbeatBody, Identity, Pulse, PulseEvent, RefuseCode,
};

const INTERVAL: Duration = Duration::from_millis(20);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn said(pulse: &mut Pulse, now: Duration) -> Vec<u8> {
    drain(|| pulse.poll_transmit(now))
}

fn events(pulse: &mut Pulse) -> Vec<PulseEvent> {
    core::iter::from_fn(|| pulse.poll_event()).collect()
}

fn body(epoch: u64) -> HeartbeatBody {
    HeartbeatBody { committed_epoch: Epoch(epoch), state: 2, armed: 3, arbiter_ok_ms: Some(40) }
}

/// The payload of a heartbeat that was said at the first moment of a process.
const BEAT: [u8; 24] = {
    let mut payload = [0; 24];
    payload[16] = 1;
    payload
};

/// Hello and heartbeat of heartbeat connections, from the specification.
fn forged_hello(forge: &mut Forge) -> Vec<u8> {
    let mut payload = vec![2, 0, 0, 0, 1, 0, 1, 0];
    payload.extend([1u64, 0].map(u64::to_le_bytes).concat());
    payload.extend(b"\x01a\0\0\0\0");
    forge.frame(support::HELLO, 0, &payload)
}

#[test]
fn pulse_beats_when_due_and_is_heard() {
    let (mut here, mut there) = (Pulse::new(primary(), INTERVAL, ms(0)), Pulse::new(backup(), INTERVAL, ms(5)));
    here.set_body(body(9));
    there.handle_bytes(&said(&mut here, ms(0))).unwrap();
    let heard = PulseEvent::Heard { peer: primary(), body: body(9), answers: None };
    assert_eq!(events(&mut there), [PulseEvent::Opened { peer: primary() }, heard]);
    here.handle_bytes(&said(&mut there, ms(5))).unwrap();
    assert_eq!(here.next_deadline(), Some(ms(20)));
    assert_eq!(said(&mut here, ms(19)), []);
    assert_eq!(said(&mut here, ms(20)).len(), 80 + 24);
    assert_eq!(said(&mut here, ms(20)), []);
    // A process that was stopped for a second says one heartbeat, not fifty.
    assert_eq!(said(&mut here, ms(1020)).len(), 80 + 24);
    assert_eq!(here.next_deadline(), Some(ms(1040)));
}

#[test]
fn pulse_of_a_lower_generation_is_dropped_and_told_apart() {
    let (mut here, mut there) = (Pulse::new(primary(), INTERVAL, ms(0)), Pulse::new(backup(), INTERVAL, ms(0)));
    // The primary (generation 3) hears a backup that knows no generation yet; the backup hears the primary's.
    here.handle_bytes(&said(&mut there, ms(0))).unwrap();
    assert_eq!(events(&mut here), [PulseEvent::Opened { peer: backup() }, PulseEvent::Stale { peer: backup() }]);
    there.handle_bytes(&said(&mut here, ms(0))).unwrap();
    assert!(matches!(&events(&mut there)[..], [_, PulseEvent::Heard { peer, .. }] if peer.generation == Generation(3)));
    there.raise_generation(Generation(3)).unwrap();
    here.handle_bytes(&said(&mut there, ms(20))).unwrap();
    let raised = Identity { generation: Generation(3), ..backup() };
    assert_eq!(
        events(&mut here),
        [PulseEvent::Heard { peer: raised, body: HeartbeatBody::default(), answers: Some(ms(0)) }]
    );
    // The backup takes over: the primary learns of the higher generation although its own heartbeats are dropped.
    there.raise_generation(Generation(4)).unwrap();
    here.handle_bytes(&said(&mut there, ms(40))).unwrap();
    assert!(matches!(&events(&mut here)[..], [PulseEvent::Heard { peer, .. }] if peer.generation == Generation(4)));
    there.handle_bytes(&said(&mut here, ms(40))).unwrap();
    assert_eq!(events(&mut there), [PulseEvent::Stale { peer: primary() }]);
    assert_eq!(there.raise_generation(Generation(3)).unwrap_err().code(), "api_misuse");
}

/// What waited in the connection for seconds is known to be that old, and what answers something new is new. Clocks of the two sides have nothing in common.
#[test]
fn pulse_tells_how_old_a_heartbeat_may_be() {
    let there_at = |now: Duration| now + Duration::from_secs(86_400 * 60);
    let mut here = Pulse::new(primary(), INTERVAL, ms(0));
    let standby = Identity { generation: primary().generation, ..backup() };
    let mut there = Pulse::new(standby, INTERVAL, there_at(ms(0)));
    let answers = |pulse: &mut Pulse| match events(pulse).pop() {
        Some(PulseEvent::Heard { answers, .. }) => answers,
        other => panic!("{other:?}"),
    };
    let first = said(&mut there, there_at(ms(0)));
    there.handle_bytes(&said(&mut here, ms(0))).unwrap();
    here.handle_bytes(&first).unwrap();
    assert_eq!(answers(&mut here), None, "it was said before anything was heard");
    let waiting: Vec<Vec<u8>> = (1..=100).map(|n| said(&mut there, there_at(n * INTERVAL))).collect();
    let mut held: Vec<u8> = (1..=100).flat_map(|n| said(&mut here, n * INTERVAL)).collect();
    for bytes in waiting {
        here.handle_bytes(&bytes).unwrap();
        assert_eq!(answers(&mut here), Some(ms(0)), "only our first heartbeat got through before the cut");
    }
    held.extend(said(&mut here, ms(2020)));
    there.handle_bytes(&held).unwrap();
    here.handle_bytes(&said(&mut there, there_at(ms(2021)))).unwrap();
    assert_eq!(answers(&mut here), Some(ms(2020)));
}

#[test]
fn pulse_floods_become_one_event() {
    let mut forge = Forge::primary();
    let mut pulse = Pulse::new(backup(), INTERVAL, ms(0));
    pulse.handle_bytes(&forged_hello(&mut forge)).unwrap();
    for _ in 0..10_000 {
        pulse.handle_bytes(&forge.frame(HEARTBEAT, 0, &BEAT)).unwrap();
    }
    assert_eq!(events(&mut pulse).len(), 2);
}

#[test]
fn pulse_goodbye_is_the_last_word() {
    let (mut here, mut there) = (Pulse::new(primary(), INTERVAL, ms(0)), Pulse::new(backup(), INTERVAL, ms(0)));
    there.handle_bytes(&said(&mut here, ms(0))).unwrap();
    events(&mut there);
    here.goodbye(GoodbyeReason::Stopped, "switched off\x07").unwrap();
    there.handle_bytes(&said(&mut here, ms(100))).unwrap();
    match &events(&mut there)[..] {
        [PulseEvent::Goodbye { goodbye, generation: Generation(3) }] => {
            assert_eq!((goodbye.reason, goodbye.text.as_str()), (GoodbyeReason::Stopped, "switched off?"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((said(&mut here, ms(200)), here.next_deadline()), (vec![], None));
    assert_eq!(here.goodbye(GoodbyeReason::Stopped, "").unwrap_err().code(), "api_misuse");
}

/// Corpus rows 2, 9, 10 and 22 on the heartbeat connection.
#[test]
fn pulse_of_others_and_broken_ones_are_refused() {
    let refused = |forgery: &dyn Fn(&mut Forge) -> Vec<u8>| {
        let mut forge = Forge::primary();
        let mut pulse = Pulse::new(backup(), INTERVAL, ms(0));
        pulse.handle_bytes(&forged_hello(&mut forge)).unwrap();
        said(&mut pulse, ms(0));
        events(&mut pulse);
        let error = pulse.handle_bytes(&forgery(&mut forge)).expect_err("a bad heartbeat was believed");
        assert_eq!(events(&mut pulse), [], "{error}");
        assert_eq!(said(&mut pulse, ms(500))[10], support::REFUSE, "{error}");
        assert_eq!(pulse.next_deadline(), None);
        error.code()
    };
    let beat = |forge: &mut Forge| forge.frame(HEARTBEAT, 0, &BEAT);
    let as_other = |change: fn(&mut Forge)| {
        refused(&|forge| {
            change(forge);
            beat(forge)
        })
    };
    assert_eq!(as_other(|forge| forge.vm += 1), "incompatible.other_vm");
    assert_eq!(as_other(|forge| forge.incarnation += 1), "misbehaved.other_incarnation");
    assert_eq!(as_other(|forge| forge.generation -= 1), "misbehaved.generation_changed");
    assert_eq!(as_other(|forge| forge.sequence += 1), "misbehaved.sequence");
    assert_eq!(as_other(|forge| forge.sequence = u64::MAX), "misbehaved.sequence");
    assert_eq!(as_other(|forge| forge.version = 2), "incompatible.version");
    assert_eq!(
        refused(&|forge| forge.frame(
            HEARTBEAT,
            0,
            &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        )),
        "malformed.reserved"
    );
    assert_eq!(refused(&|forge| forge.frame(HEARTBEAT, 0, &[0; 24])), "malformed.value", "said at no time");
    assert_eq!(refused(&|forge| forge.begin(1, 0)), "misbehaved.unexpected");
    assert_eq!(refused(&|forge| forge.hello()), "misbehaved.unexpected");
    assert_eq!(refused(&|forge| forge.frame(support::ACK, 1, &[])), "misbehaved.unexpected");
    let mut frame = Forge { sequence: 1, ..Forge::primary() }.frame(HEARTBEAT, 0, &BEAT);
    for bit in 0..frame.len() * 8 {
        frame[bit / 8] ^= 1 << (bit % 8);
        assert!(refused(&|_| frame.clone()).starts_with("malformed."), "bit {bit}");
        frame[bit / 8] ^= 1 << (bit % 8);
    }
    // A data hello on a heartbeat connection, and one's own.
    let mut pulse = Pulse::new(backup(), INTERVAL, ms(0));
    assert_eq!(pulse.handle_bytes(&Forge::primary().hello()).unwrap_err().code(), "incompatible.features");
    let mut pulse = Pulse::new(backup(), INTERVAL, ms(0));
    let own = said(&mut pulse, ms(0));
    assert_eq!(pulse.handle_bytes(&own).unwrap_err().code(), "incompatible.self_connection");
    let mut there = Pulse::new(Identity { incarnation: support::PRIMARY, ..backup() }, INTERVAL, ms(0));
    there.handle_bytes(&said(&mut Pulse::new(backup(), INTERVAL, ms(0)), ms(0))).unwrap_err();
    let refusal = said(&mut there, ms(0));
    let start = support::frame_starts(&refusal);
    assert_eq!(refusal[start[start.len() - 2] + 80..][..2], [2, 0], "refusal names the self connection");
}

#[test]
fn pulse_that_is_refused_says_why() {
    let mut pulse = Pulse::new(primary(), INTERVAL, ms(0));
    let refusal = Forge::backup().frame(support::REFUSE, 0, &[8, 0, 0, 0, 0, 0, 4, 0, b'b', b'u', b's', b'y']);
    pulse.handle_bytes(&refusal).unwrap();
    match &events(&mut pulse)[..] {
        [PulseEvent::Refused { refuse, .. }] => {
            assert_eq!((refuse.code, refuse.text.as_str()), (RefuseCode::Busy, "busy"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn pulse_goes_on_from_a_greeting() {
    let mut here = Pulse::new(primary(), INTERVAL, ms(0));
    let mut greeting = Greeting::new();
    let caller = greeting.handle_bytes(&said(&mut here, ms(0))).unwrap().unwrap();
    assert_eq!(caller.channel, Channel::Heartbeat);
    let mut there = Pulse::new(backup(), INTERVAL, ms(0));
    there.handle_bytes(&greeting.into_bytes()).unwrap();
    assert_eq!(events(&mut there).len(), 2, "the hello, and the heartbeat that came with it");
}
