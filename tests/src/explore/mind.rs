//! The real core, driven: what it answered once to an input in a state it need not be asked again.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{Action, ArbiterRequest, Core, FenceReason, GoodbyeReason, Input, View};
use failover::exit::ExitCode;

use super::setup::{NEVER, NOW};
use super::world::{Print, Printed, print_of};

/// A core in a canonical state at [`NOW`], with what can be read off it.
#[derive(Debug)]
pub struct Mind {
    /// The real core.
    core: Core,
    /// What it shows of itself.
    pub view: View,
    /// When its next timer runs out, if one ever does.
    pub deadline: Option<Duration>,
}

impl Hash for Mind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.core.hash(state);
    }
}

impl Mind {
    /// A core, made canonical. `now` is its time.
    pub fn new(mut core: Core, now: Duration) -> Printed<Self> {
        core.canonicalise(now, NOW);
        let view = core.view(NOW);
        let deadline = core.next_deadline(NOW).filter(|at| *at != NEVER);
        Printed::new(Self { core, view, deadline })
    }
}

/// What the core wants done. As [`Action`], but that a permit is only its generation: what is explored is done more than once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the action of its name")]
pub enum Deed {
    Arbiter(Arc<ArbiterRequest>),
    Persist(u8),
    Boot(u8),
    Activate(u8),
    ResumeFenced(u8),
    OfferAsBackup,
    AskPeer,
    StartBase(NodeRef),
    DropBackup,
    HoldOutput,
    OpenOutput,
    TrustAcks(NodeRef),
    PauseGuest,
    ResumeGuest,
    Fence(FenceReason),
    BeginSwitchover,
    SayGoodbye(GoodbyeReason),
    Rejoin,
    Exit(ExitCode),
    /// For people only.
    Say(String),
}

/// A small number of the model.
pub fn small(number: u64) -> u8 {
    u8::try_from(number).expect("the bounds keep numbers small")
}

impl From<Action> for Deed {
    fn from(action: Action) -> Self {
        match action {
            Action::Arbiter { op: _, mut request } => {
                if let ArbiterRequest::Cas { record, .. } = &mut request {
                    record.note.clear();
                }
                Self::Arbiter(Arc::new(request))
            }
            Action::PersistGeneration(generation) => Self::Persist(small(generation.0)),
            Action::BootGuest(permit) => Self::Boot(small(permit.generation().0)),
            Action::Activate(permit) => Self::Activate(small(permit.generation().0)),
            Action::ResumeFenced(permit) => Self::ResumeFenced(small(permit.generation().0)),
            Action::OfferAsBackup => Self::OfferAsBackup,
            Action::AskPeer => Self::AskPeer,
            Action::StartBase { backup } => Self::StartBase(backup),
            Action::DropBackup => Self::DropBackup,
            Action::HoldOutput => Self::HoldOutput,
            Action::OpenOutput => Self::OpenOutput,
            Action::TrustAcks { backup } => Self::TrustAcks(backup),
            Action::PauseGuest => Self::PauseGuest,
            Action::ResumeGuest => Self::ResumeGuest,
            Action::Fence { reason } => Self::Fence(reason),
            Action::BeginSwitchover => Self::BeginSwitchover,
            Action::SayGoodbye(reason) => Self::SayGoodbye(reason),
            Action::Rejoin => Self::Rejoin,
            Action::Exit(code) => Self::Exit(code),
            Action::Reply { .. } | Action::Announce { .. } | Action::Alarm { .. } | Action::Verify(_) => {
                Self::Say(format!("{action:?}"))
            }
        }
    }
}

type Answered = (Printed<Mind>, Arc<Vec<Deed>>);

/// What cores answered so far. One for each thread.
#[derive(Debug, Default)]
pub struct Memory {
    answers: HashMap<(Print, Print, bool), Answered>,
}

impl Memory {
    /// Hands an input to a core; `late`: at the moment when its next timer runs out.
    pub fn ask(&mut self, mind: &Printed<Mind>, input: Input, late: bool) -> Answered {
        let key = (mind.print, print_of(&input), late);
        if let Some(answered) = self.answers.get(&key) {
            return answered.clone();
        }
        let now = if late { mind.deadline.expect("a timer runs") } else { NOW };
        let mut core = mind.core.clone();
        let deeds = core.handle(input, now).into_iter().map(Deed::from).collect();
        let answered = (Mind::new(core, now), Arc::new(deeds));
        self.answers.insert(key, answered.clone());
        answered
    }
}
