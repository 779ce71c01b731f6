//! Single rules: start, stop, switchover, force, policies, and what must never be concluded.

use std::time::Duration;

use replication_proto::{Epoch, Generation, Incarnation, VmId};

use super::super::*;
use super::world::{A, B, Guest, Service, VM, World, ms, node_ref};
use crate::exit::ExitCode;

#[test]
fn start_a_restarted_primary_offers_itself_and_never_beats_the_takeover() {
    for powered_off in [false, true] {
        let mut world = World::protected();
        if powered_off {
            world.power_off(A)
        } else {
            world.kill(A)
        }
        if powered_off {
            world.cut = [false; 2];
        }
        world.start(A, Role::Primary);
        let took = world.run_until(ms(1000), |world| world.open(B)).expect("takeover");
        assert!(took <= ms(100), "its new incarnation proves that the old one is dead: {took:?}");
        assert_eq!(world.running(), [B]);
        assert!(world.run_until(ms(3000), |world| world.state(B) == StateName::Protected).is_some());
        world.run(ms(50));
        assert_eq!(world.state(A), StateName::InSync);
    }
}

#[test]
fn start_a_backup_never_creates_the_record_nor_boots() {
    let mut world = World::new();
    world.start(B, Role::Backup);
    world.run(ms(3000));
    assert_eq!((world.record.clone(), world.state(B)), (None, StateName::Standby));
    world.start(A, Role::Primary);
    assert!(world.run_until(ms(1000), |world| world.state(A) == StateName::Protected).is_some());
}

/// Found by the simulator (seed 1154): the base and its commit were ignored while the first read of the record was under way, so the record named a
/// backup in sync that did not know it, and nobody took over.
#[test]
fn a_backup_whose_base_is_faster_than_the_arbiters_first_answer_is_in_sync() {
    let (owner, me) = (node_ref(A, 1), node_ref(B, 2));
    let mut core = Core::new(CoreConfig {
        vm: VM,
        me: me.clone(),
        peer: owner.node.clone(),
        role: Role::Backup,
        highest_generation: Generation(0),
        on_backup_loss: OnBackupLoss::Solo,
        cold_start: ColdStart::Owner,
        rejoin: Rejoin::default(),
        force_cold_boot: false,
        timers: CoreTimers::default(),
    });
    core.handle(Input::Started, ms(0));
    core.handle(Input::BaseBegun { owner: owner.clone() }, ms(10));
    core.handle(Input::BaseCommitted { peer: owner.clone(), epoch: Epoch(1) }, ms(20));
    let record = Record {
        v: RECORD_VERSION,
        cluster_id: VM,
        generation: Generation(1),
        owner: owner.clone(),
        in_sync: Some(me),
        reason: Reason::Protected,
        written_by: owner,
        note: String::new(),
    };
    let read = Answer::Read(Ok(Some(Versioned { revision: Revision(2), record })));
    core.handle(Input::Arbiter { op: OpId(1), answer: read }, ms(30));
    assert_eq!(core.state_name(), StateName::InSync);
    core.handle(Input::LinkLost(LinkLoss::PeerClosed), ms(40));
    let actions = core.handle(Input::Tick, ms(100));
    assert!(actions.iter().any(|a| matches!(a, Action::Arbiter { request: ArbiterRequest::Cas { .. }, .. })));
}

/// Found by the simulator (seed 747): a takeover's request was carried out after the process that had made it was gone and its successor had offered
/// itself as the backup; the former owner was gone, too. The record named nobody who lived, and both sides waited for ever.
#[test]
fn start_whoever_finds_that_a_former_life_was_granted_the_guest_late_boots_it() {
    let (me, former, peer) = (node_ref(A, 3), node_ref(A, 2), node_ref(B, 1));
    let late = |role, cold_start, in_sync| {
        let mut core = Core::new(CoreConfig {
            vm: VM,
            me: me.clone(),
            peer: peer.node.clone(),
            role,
            highest_generation: Generation(5),
            on_backup_loss: OnBackupLoss::Solo,
            cold_start,
            rejoin: Rejoin::default(),
            force_cold_boot: false,
            timers: CoreTimers::default(),
        });
        let record = |generation, owner: &NodeRef, in_sync: Option<&NodeRef>| Record {
            v: RECORD_VERSION,
            cluster_id: VM,
            generation: Generation(generation),
            owner: owner.clone(),
            in_sync: in_sync.cloned(),
            reason: Reason::Takeover,
            written_by: owner.clone(),
            note: String::new(),
        };
        let read = |revision, record| Answer::Read(Ok(Some(Versioned { revision: Revision(revision), record })));
        core.handle(Input::Started, ms(0));
        // A backup offers itself at once, and asks in the same breath.
        let before = record(5, &peer, Some(&former));
        core.handle(Input::Arbiter { op: OpId(1), answer: read(7, before) }, ms(10));
        assert_eq!(core.state_name(), StateName::Standby);
        core.handle(Input::Tick, ms(60_000));
        let after = record(6, &former, in_sync);
        let actions = core.handle(Input::Arbiter { op: OpId(2), answer: read(8, after) }, ms(60_001));
        let wants = |action: &Action| match action {
            Action::Arbiter { request: ArbiterRequest::Cas { expected, record }, .. } => {
                assert_eq!((*expected, record.generation), (Some(Revision(8)), Generation(7)));
                true
            }
            _ => false,
        };
        actions.iter().any(wants)
    };
    assert!(late(Role::Primary, ColdStart::Owner, None));
    assert!(!late(Role::Backup, ColdStart::Owner, None), "a backup boots nothing");
    assert!(!late(Role::Primary, ColdStart::Never, None), "nor does anybody whom the policy forbids it");
    assert!(!late(Role::Primary, ColdStart::Owner, Some(&peer)), "whoever is in sync may take over");
}

#[test]
fn start_of_two_primaries_one_owns_and_the_other_becomes_its_backup() {
    let mut world = World::new();
    world.start(A, Role::Primary);
    world.start(B, Role::Primary);
    world.run(ms(1000));
    assert_eq!(world.running().len(), 1);
    assert!(
        world.run_until(ms(2000), |world| [A, B].iter().any(|at| world.state(*at) == StateName::Protected)).is_some()
    );
}

#[test]
fn start_waits_for_the_arbiter_and_boots_nothing_without_it() {
    let mut world = World::new();
    world.nodes[A].service = Service::Down;
    world.start(A, Role::Primary);
    world.run(ms(5000));
    assert_eq!((world.state(A), world.view(A).reason), (StateName::Starting, ReasonCode::ArbiterUnreachable));
    world.nodes[A].service = Service::Good;
    world.run(ms(200));
    assert_eq!(world.running(), [A]);
}

#[test]
fn stop_and_power_off_keep_the_guest_off_on_both_sides() {
    type End = fn(&mut World);
    let ends: [(End, ExitCode); 4] = [
        (|world| world.command(A, Command::Stop), ExitCode::Ok),
        (|world| world.input(A, Input::GuestEnded(GuestEnd::PoweredOff)), ExitCode::Ok),
        (|world| world.input(A, Input::GuestEnded(GuestEnd::Reset)), ExitCode::GuestReset),
        (|world| world.input(A, Input::GuestEnded(GuestEnd::Crashed)), ExitCode::GuestCrashed),
    ];
    for (end, code) in ends {
        let mut world = World::protected();
        end(&mut world);
        world.run(ms(5000));
        assert_eq!(world.nodes[A].exit, Some(code));
        assert!(world.running().is_empty());
        let record = world.record.clone().unwrap().record;
        assert_eq!((record.in_sync, record.reason), (None, Reason::Stopped));
        assert_eq!(world.state(B), StateName::Standby);
        // An explicit start boots again, whatever the policy for crashes is.
        world.cold_start = ColdStart::Never;
        world.start(A, Role::Primary);
        world.run(ms(3000));
        assert_eq!(world.nodes[A].guest, Guest::Runs(Generation(2)));
        assert_eq!(world.state(A), StateName::Protected);
    }
}

#[test]
fn stop_with_a_lost_answer_and_without_an_arbiter() {
    let mut world = World::protected();
    world.nodes[A].service = Service::Late(ms(30));
    world.command(A, Command::Stop);
    world.run(ms(40));
    world.nodes[A].service = Service::Good;
    world.run(ms(3000));
    assert_eq!(world.nodes[A].exit, Some(ExitCode::Ok));
    assert!(world.running().is_empty());

    let mut world = World::protected();
    world.nodes[A].service = Service::Down;
    world.command(A, Command::Stop);
    world.run(ms(11_000));
    assert_eq!(world.nodes[A].exit, Some(ExitCode::StopNotRecorded));
    world.run(ms(5000));
    assert!(world.running().is_empty(), "the backup heard the goodbye");
}

#[test]
fn stop_of_a_backup_lets_the_primary_go_on_at_once() {
    let mut world = World::protected();
    world.command(B, Command::Stop);
    let stall = world.run_until(ms(1000), |world| world.open(A)).expect("solo");
    assert!(stall <= ms(10), "{stall:?}");
    assert_eq!(world.nodes[B].exit, Some(ExitCode::Ok));
}

#[test]
fn switchover_moves_the_guest_and_loses_nothing() {
    let mut world = World::protected();
    world.command(A, Command::Switchover);
    let took = world.run_until(ms(1000), |world| world.open(B)).expect("handed over");
    assert!(took <= ms(50), "{took:?}");
    world.run(ms(200));
    assert_eq!(world.running(), [B]);
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Done(_)]));
    assert_eq!(world.record.clone().unwrap().record.reason, Reason::Switchover);
}

#[test]
fn switchover_is_given_up_when_the_backup_cannot_take_over_and_the_guest_goes_on() {
    let mut world = World::protected();
    world.nodes[B].service = Service::Down;
    world.command(A, Command::Switchover);
    world.run(ms(6000));
    assert_eq!(world.running(), [A]);
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Refused(_)]));
    world.nodes[B].service = Service::Good;
    world.run(ms(5000));
    assert_eq!(world.running(), [A]);
    assert_eq!(world.state(A), StateName::Protected);
}

#[test]
fn switchover_is_refused_where_it_makes_no_sense() {
    let mut world = World::protected();
    world.kill(B);
    world.run(ms(500));
    world.command(A, Command::Switchover);
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Refused(_)]));
    assert_eq!(world.running(), [A]);
}

#[test]
fn force_is_refused_on_a_hollow_standby_and_on_the_owner() {
    let mut world = World::new();
    world.start(B, Role::Backup);
    world.run(ms(100));
    world.command(B, Command::ForceTakeover { without_arbiter: true });
    world.run(ms(10_000));
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]));
    assert!(world.running().is_empty());
    world.start(A, Role::Primary);
    world.run(ms(500));
    world.command(A, Command::ForceTakeover { without_arbiter: true });
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Refused(_)]));
}

#[test]
fn force_without_an_arbiter_needs_to_be_said_and_the_old_owner_yields_when_it_hears_of_it() {
    let mut world = World::protected();
    (world.nodes[A].service, world.nodes[B].service) = (Service::Down, Service::Down);
    world.freeze(A, true);
    world.run(ms(1000));
    world.command(B, Command::ForceTakeover { without_arbiter: false });
    world.run(ms(6000));
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]));
    world.command(B, Command::ForceTakeover { without_arbiter: true });
    world.run(ms(6000));
    assert!(world.open(B) && world.view(B).blind);
    world.freeze(A, false);
    world.run(ms(200));
    assert_eq!(world.state(A), StateName::Fenced, "higher generation seen");
}

#[test]
fn force_seeds_an_arbiter_that_lost_its_record() {
    let mut world = World::protected();
    world.kill(A);
    world.record = None;
    world.run(ms(1000));
    assert!(world.running().is_empty());
    assert_eq!(world.view(B).alarm, Some(ReasonCode::ArbiterRolledBack));
    world.command(B, Command::ForceTakeover { without_arbiter: false });
    world.run(ms(500));
    assert_eq!(world.nodes[B].guest, Guest::Runs(Generation(2)));
    assert_eq!(world.record.clone().unwrap().record.generation, Generation(2));
    world.start(A, Role::Backup);
    assert!(world.run_until(ms(3000), |world| world.state(B) == StateName::Protected).is_some());
}

#[test]
fn hold_policy_lets_nothing_out_that_is_not_on_two_hosts() {
    let mut world = World::new();
    world.hold_policy = true;
    world.start(A, Role::Primary);
    world.run(ms(500));
    assert_eq!((world.state(A), world.open(A)), (StateName::Solo, false));
    world.start(B, Role::Backup);
    world.run(ms(1000));
    assert_eq!(world.state(A), StateName::Protected);
    world.kill(B);
    world.run(ms(20_000));
    assert_eq!((world.state(A), world.open(A)), (StateName::Solo, false));
    world.start(B, Role::Backup);
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn unprotect_and_protect() {
    let mut world = World::protected();
    world.command(A, Command::Unprotect);
    world.run(ms(5000));
    assert!(world.open(A));
    assert_eq!(world.record.clone().unwrap().record.reason, Reason::Unprotected);
    world.command(A, Command::Protect);
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn r3_solo_is_not_concluded_from_a_read_while_an_own_sync_write_may_still_land() {
    // The sync write is lost and lands 300 ms later; meanwhile the backup dies and the record reads "nobody in sync".
    let mut world = World::new();
    world.start(A, Role::Primary);
    world.run(ms(100));
    world.start(B, Role::Backup);
    world.nodes[A].service = Service::Late(ms(300));
    world.run_until(ms(2000), |world| world.late == 1).expect("the sync write");
    world.nodes[A].service = Service::Good;
    world.cut = [true; 2];
    let before = world.record.clone().unwrap().revision;
    assert!(world.run_until(ms(1000), |world| world.open(A)).is_some());
    let record = world.record.clone().unwrap();
    assert!(record.revision > before, "the revision was bumped before output was opened");
    assert_eq!(record.record.in_sync, None);
    world.run(ms(1000));
    assert_eq!(world.record, Some(record), "the late write found another revision");
    assert_eq!(world.running(), [A]);
}

#[test]
fn r4_the_record_must_name_this_very_process_and_it_must_have_a_base() {
    let node = |name: &str, incarnation| NodeRef { node: name.parse().unwrap(), incarnation: Incarnation(incarnation) };
    for (named, hollow, takes_over) in [(2, false, true), (3, false, false), (2, true, false)] {
        let config = CoreConfig {
            vm: VmId(7),
            me: node("b", 2),
            peer: node("a", 0).node,
            role: Role::Backup,
            highest_generation: Generation(0),
            on_backup_loss: OnBackupLoss::Solo,
            cold_start: ColdStart::Owner,
            rejoin: Rejoin::default(),
            force_cold_boot: false,
            timers: CoreTimers::default(),
        };
        let mut core = Core::new(config);
        core.handle(Input::Started, ms(0));
        core.handle(Input::BaseBegun { owner: node("a", 1) }, ms(1));
        core.handle(Input::BaseCommitted { peer: node("a", 1), epoch: Epoch(1) }, ms(2));
        if hollow {
            core.handle(Input::BaseBegun { owner: node("a", 1) }, ms(2));
        }
        let record = Record {
            v: RECORD_VERSION,
            cluster_id: VmId(7),
            generation: Generation(1),
            owner: node("a", 1),
            in_sync: Some(node("b", named)),
            reason: Reason::Protected,
            written_by: node("a", 1),
            note: String::new(),
        };
        let answer = Answer::Read(Ok(Some(Versioned { revision: Revision(5), record })));
        core.handle(Input::Arbiter { op: OpId(1), answer: answer.clone() }, ms(3));
        let mut writes = 0;
        // Silence. Whatever it reads again is the same record.
        for at in (10..3000).step_by(10) {
            for action in core.handle(Input::Tick, ms(at)) {
                match action {
                    Action::Arbiter { op, request: ArbiterRequest::Read } => {
                        core.handle(Input::Arbiter { op, answer: answer.clone() }, ms(at));
                    }
                    Action::Arbiter { request: ArbiterRequest::Cas { .. }, .. } => writes += 1,
                    _ => {}
                }
            }
        }
        assert_eq!(writes > 0, takes_over, "incarnation {named} is named, this one is 2, hollow: {hollow}");
    }
}

#[test]
fn r3_protected_is_not_concluded_from_a_read_while_an_own_solo_write_may_still_land() {
    let mut world = World::protected();
    world.nodes[A].service = Service::Late(ms(400));
    world.cut = [true; 2];
    world.run_until(ms(500), |world| world.late == 1).expect("the solo write");
    // The link is back before the write lands, and before anybody took over. The world checks each claim of PROTECTED.
    world.nodes[A].service = Service::Good;
    world.cut = [false; 2];
    world.run(ms(1000));
    assert_eq!(world.running(), [A]);
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn r5_output_is_held_before_the_record_names_the_backup() {
    let mut world = World::new();
    world.start(A, Role::Primary);
    world.start(B, Role::Backup);
    let in_sync = |world: &World| world.record.as_ref().is_some_and(|stored| stored.record.in_sync.is_some());
    world.run_until(ms(2000), in_sync).expect("in sync");
    assert_eq!(world.view(A).gate, Gate::Held);
    assert_ne!(world.state(A), StateName::Protected, "only the answer makes it so");
    world.run(ms(10));
    assert_eq!(world.state(A), StateName::Protected);
}

#[test]
fn a_lost_backup_is_held_back_then_the_arbiter_is_asked_then_the_connection_is_closed() {
    let mut world = World::protected();
    let now = world.now;
    let core = world.nodes[A].core.as_mut().expect("alive");
    let order: Vec<u8> = core
        .handle(Input::LinkLost(LinkLoss::Local), now)
        .iter()
        .filter_map(|action| match action {
            Action::HoldOutput => Some(1),
            Action::Arbiter { .. } => Some(2),
            Action::DropBackup => Some(3),
            _ => None,
        })
        .collect();
    assert_eq!(order, [1, 2, 3]);
}

#[test]
fn a_pair_fails_over_back_and_forth() {
    let mut world = World::protected();
    for round in 0..10 {
        let (owner, other) = if round % 2 == 0 { (A, B) } else { (B, A) };
        world.kill(owner);
        assert!(world.run_until(ms(500), |world| world.open(other)).is_some(), "round {round}");
        world.start(owner, Role::Primary);
        assert!(
            world.run_until(ms(5000), |world| world.state(other) == StateName::Protected).is_some(),
            "round {round}"
        );
        world.run(Duration::from_secs(61));
    }
    assert_eq!(world.record.clone().unwrap().record.generation, Generation(11));
}

#[test]
fn a_data_connection_that_dies_alone_ends_protection_although_heartbeats_go_on() {
    let mut world = World::protected();
    world.input(A, Input::LinkLost(LinkLoss::Local));
    // At once: the backup sees the connection close, too, and contends after its grace.
    assert!(world.run_until(ms(5), |world| world.open(A)).is_some());
    world.run(ms(100));
    assert_eq!(world.running(), [A]);
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn protection_that_ends_for_an_overload_says_so_and_comes_back() {
    let mut world = World::protected();
    world.input(A, Input::LinkLost(LinkLoss::Overloaded));
    assert!(world.run_until(ms(5), |world| world.open(A)).is_some());
    let view = world.view(A);
    assert_eq!((view.state, view.reason), (StateName::Solo, ReasonCode::Overloaded));
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn a_backup_whose_connection_was_dropped_is_not_waited_for() {
    let mut world = World::protected();
    let backup = world.nodes[B].me.clone();
    let bases = world.nodes[A].bases;
    // It joins anew before its old connection is given up; the shell drops all there is. Nothing is heard of it any more.
    world.cut = [true; 2];
    world.input(A, Input::BackupJoined { backup });
    world.run(ms(5000));
    assert_eq!((world.state(A), world.nodes[A].bases), (StateName::Solo, bases), "no base for nobody");
    world.cut = [false; 2];
    assert!(world.run_until(ms(5000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn force_is_given_up_when_a_new_base_makes_the_standby_hollow() {
    for without_arbiter in [false, true] {
        let mut world = World::protected();
        world.power_off(A);
        world.nodes[B].service = Service::Down;
        world.run(ms(1000));
        world.command(B, Command::ForceTakeover { without_arbiter });
        world.run(ms(100));
        // The owner was not dead: it comes back with a base while the operator waits.
        let owner = world.nodes[A].me.clone();
        world.input(B, Input::BaseBegun { owner });
        world.run(ms(10_000));
        assert!(world.running().is_empty(), "nothing runs from half a base");
        assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]), "{:?}", world.nodes[B].replies);
        assert_eq!(world.state(B), StateName::Standby);
    }
}

#[test]
fn a_stop_beside_an_unanswered_sync_write_does_not_claim_that_nobody_takes_over() {
    let mut world = World::new();
    world.start(A, Role::Primary);
    world.run(ms(100));
    world.start(B, Role::Backup);
    let resync = |world: &World| world.state(A) == StateName::Resync && world.view(A).gate == Gate::Held;
    world.run_until(ms(2000), resync).expect("the last epoch before the write");
    // The write that names the backup gets no answer at all.
    let now = world.now;
    let backup = world.nodes[B].me.clone();
    let core = world.nodes[A].core.as_mut().expect("alive");
    let asked = core.handle(Input::ReleasedCovered { backup, epoch: Epoch(9) }, now);
    assert!(asked.iter().any(|action| matches!(action, Action::Arbiter { request: ArbiterRequest::Cas { .. }, .. })));
    core.handle(Input::GuestEnded(GuestEnd::PoweredOff), now);
    let ended = core.handle(Input::Tick, now + CoreTimers::default().stop_patience);
    let code = ended.iter().find_map(|action| match action {
        Action::Exit(code) => Some(*code),
        _ => None,
    });
    assert_eq!(code, Some(ExitCode::StopNotRecorded));
}
