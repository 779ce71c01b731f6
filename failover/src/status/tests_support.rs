//! A board and a view to test with, here and in the modules that show a status.

use std::time::Duration;

use replication_proto::{Generation, Incarnation};

use super::{Labels, NodeRole, StatusBoard};
use crate::arbiter::NodeRef;
use crate::decide::{Gate, StateName, View};
use crate::reason::ReasonCode;

pub(crate) fn board() -> StatusBoard {
    let labels = Labels {
        vm: "web1".into(),
        vm_id: "6f3c0000-1111-4222-8333-444455556666".into(),
        machine: "kvm",
        node: "a".into(),
        peer: "b".into(),
        incarnation: Incarnation(1),
        pace: crate::config::EpochPace::Fixed(Duration::from_millis(25)),
        output_limit: 64 << 20,
        insecure_link: true,
    };
    StatusBoard::new(&labels, NodeRole::Primary)
}

pub(crate) fn view(state: StateName) -> View {
    let backup = NodeRef { node: "b".parse().unwrap(), incarnation: Incarnation(2) };
    View {
        state,
        reason: if state == StateName::Protected { ReasonCode::Covered } else { ReasonCode::BackupSilent },
        since: Duration::ZERO,
        generation: Generation(7),
        owner: true,
        gate: if state == StateName::Protected { Gate::OnAck(backup) } else { Gate::Open },
        protected: state == StateName::Protected,
        armed: state == StateName::Protected,
        partner: None,
        partner_age: Some(Duration::from_millis(4)),
        partner_arbiter_age: Some(Duration::from_millis(5)),
        committed: None,
        arbiter_age: Some(Duration::from_millis(3)),
        arbiter_pending: None,
        record: None,
        alarm: None,
        blind: false,
        asks: false,
        protects_in: None,
    }
}

pub(crate) fn protected() -> View {
    view(StateName::Protected)
}
