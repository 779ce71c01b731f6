//! The clients of the guest.

use super::env::Event;
use super::guest::{CLIENTS, Utterance, request};
use super::{MS, Nanos, World};

/// A client that got no answer asks again.
const CLIENT_PATIENCE: Nanos = 200 * MS;

/// Somebody who waits for one answer before it asks for the next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Client {
    asked: u64,
    boot: u64,
    next_at: Nanos,
}

impl Client {
    /// Has asked for nothing yet.
    pub(super) fn new() -> Self {
        Self { asked: 1, boot: 0, next_at: 0 }
    }
}

impl World {
    pub(super) fn client_at(&mut self, client: usize, after: Nanos) {
        let at = self.env.now + after;
        self.clients[client].next_at = at;
        self.env.at(at, Event::Client(client));
    }

    pub(super) fn client_asks(&mut self, client: usize) {
        if self.clients[client].next_at == self.env.now {
            let Client { asked, boot, .. } = self.clients[client];
            let frame = request(client, boot, asked);
            self.env.frame_for_guest(&frame);
            self.client_at(client, CLIENT_PATIENCE);
        }
    }

    pub(super) fn client_hears(&mut self, frame: &[u8]) {
        let said = Utterance::decode(frame);
        let Some(client) = usize::try_from(said.client).ok().filter(|client| *client < CLIENTS) else { return };
        let of = &mut self.clients[client];
        if said.registers.boot > of.boot {
            // A guest that was booted anew knows nothing: the client begins where it is.
            (of.boot, of.asked) = (said.registers.boot, said.registers.done[client]);
        }
        if self.env.ghost.answered(client, of.asked, &said) {
            of.asked += 1;
            let pause = self.env.rng.range(2 * MS, 40 * MS);
            self.client_at(client, pause);
        }
    }
}
