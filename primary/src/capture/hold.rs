//! The wait of a stopped guest for the commit of its checkpoint (`capture = "stop-and-copy"`).

use std::time::Duration;

use crossbeam::channel::{Receiver, Select};
use replication_proto::Epoch;

use crate::output::bell::Bell;

/// How often it is looked whether the link still stands: nothing else tells.
const LOOK: Duration = Duration::from_millis(5);

/// Waits until the backup has committed `epoch`, an order waits to be carried out, or the link is gone: whoever waited for then resumes the guest. Orders
/// are left where they are.
pub fn await_commit<T>(epoch: Epoch, bell: &Bell, orders: &Receiver<T>, is_open: impl Fn() -> bool) {
    while bell.last_committed() < epoch.0 && is_open() && orders.is_empty() {
        let mut events = Select::new();
        events.recv(bell.heard());
        // Nobody gives orders any more: it is ready at once, and what follows finds out.
        events.recv(orders);
        match events.ready_timeout(LOOK) {
            Ok(0) => drop(bell.heard().try_recv()),
            Ok(_) => return,
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Instant;

    use crossbeam::channel::unbounded;

    use super::*;

    const SOON: Duration = Duration::from_millis(30);

    /// How long a wait for epoch 3 took when `what` happened soon.
    fn ended_by(what: impl FnOnce(&Bell, &AtomicBool) + Send + 'static, orders: &Receiver<()>) -> Duration {
        let (bell, open) = (Arc::new(Bell::default()), Arc::new(AtomicBool::new(true)));
        let (their_bell, their_open) = (Arc::clone(&bell), Arc::clone(&open));
        let happens = thread::spawn(move || {
            thread::sleep(SOON);
            what(&their_bell, &their_open);
        });
        let began = Instant::now();
        await_commit(Epoch(3), &bell, orders, || open.load(Ordering::Acquire));
        let waited = began.elapsed();
        happens.join().unwrap();
        waited
    }

    #[test]
    fn a_commit_an_order_and_a_lost_link_end_it() {
        let (tell, orders) = unbounded();
        let commit = |bell: &Bell, _: &AtomicBool| {
            bell.committed(2);
            thread::sleep(SOON);
            bell.committed(3);
        };
        assert!(ended_by(commit, &orders) >= 2 * SOON, "an earlier epoch's commit is not what is waited for");
        assert!(ended_by(|_, open| open.store(false, Ordering::Release), &orders) >= SOON);
        let order = tell.clone();
        assert!(ended_by(move |_, _| order.send(()).unwrap(), &orders) >= SOON);
        assert_eq!(orders.len(), 1, "an order is left to whoever carries it out");
        assert!(ended_by(|_, _| {}, &orders) < SOON, "it was there already");
        orders.recv().unwrap();
        assert!(ended_by(move |_, _| drop(tell), &orders) >= SOON, "nobody is left to give one");
    }
}
