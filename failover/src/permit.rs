//! The proof that this process may run the guest.

use replication_proto::Generation;

/// Proof that the arbiter granted this process the right to run the guest in one generation.
///
/// It is made in [`crate::decide`] only, at most once per generation, and cannot be copied: whoever resumes a guest takes it by value.
#[derive(Debug)]
#[must_use = "a permit that is dropped means that nobody runs the guest"]
pub struct RunPermit {
    generation: Generation,
}

impl RunPermit {
    /// The only constructor; called by the decision core right after a grant.
    pub(crate) fn new(generation: Generation) -> Self {
        Self { generation }
    }

    /// The generation that the guest runs in.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}
