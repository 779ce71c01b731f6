//! What is armed, and what happens at a point that is. Only with the feature `failpoints`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use signal_hook::consts::{SIGKILL, SIGSTOP};
use signal_hook::low_level::raise;

use super::Point;

/// What an armed point does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Crash,
    Stop,
    Pause(Duration),
    Error,
}

/// One order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Armed {
    point: Point,
    fault: Fault,
    /// Passes until it fires, this one included.
    passes: u64,
    /// As it was ordered.
    text: String,
}

#[derive(Default)]
struct Orders {
    armed: Vec<Armed>,
    passed: Vec<Point>,
    log: Option<File>,
}

static ORDERS: LazyLock<Mutex<Orders>> = LazyLock::new(Mutex::default);

/// Takes the orders in the environment, and listens for more. Called once, first of all.
///
/// # Panics
/// When an order makes no sense or the place for further ones cannot be used: a test must not go on as if nothing were to happen.
pub fn begin() {
    let mut orders = lock();
    for text in std::env::var("FAILPOINTS").unwrap_or_default().split(';').filter(|text| !text.is_empty()) {
        let armed = parse(text).unwrap_or_else(|why| panic!("FAILPOINTS: {why}"));
        orders.armed.push(armed);
    }
    let Some(dir) = std::env::var_os("FAILPOINTS_DIR").map(PathBuf::from) else { return };
    let node = std::env::args().skip_while(|word| word != "--node").nth(1).expect("--node says who takes orders");
    let open = |name: &str, how: &OpenOptions| {
        let path = dir.join(format!("{node}.{name}"));
        how.open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    orders.log = Some(open("log", OpenOptions::new().create(true).append(true)));
    // Open for writing as well: a FIFO without a writer would end at once.
    let fifo = open("orders", OpenOptions::new().read(true).write(true));
    orders.note(&format!("began {}", std::process::id()));
    drop(orders);
    let listen = std::thread::Builder::new().name("ft-failpoints".into()).spawn(move || listen(fifo));
    listen.expect("a thread that takes orders");
}

fn listen(fifo: File) {
    for line in BufReader::new(fifo).lines() {
        let line = line.unwrap_or_else(|error| panic!("the FIFO for orders: {error}"));
        let mut orders = lock();
        match line.as_str() {
            "disarm" => {
                orders.armed.clear();
                orders.note("disarmed");
            }
            text => {
                let armed = parse(text).unwrap_or_else(|why| panic!("an order: {why}"));
                orders.armed.push(armed);
                orders.note(&format!("armed {text}"));
            }
        }
    }
}

/// This process passes `point`. True: it is to fail.
pub fn pass(point: Point) -> bool {
    let mut orders = lock();
    if !orders.passed.contains(&point) {
        orders.passed.push(point);
        orders.note(&format!("passed {}", point.name()));
    }
    let Some(at) = orders.armed.iter().position(|armed| armed.point == point) else { return false };
    orders.armed[at].passes -= 1;
    if orders.armed[at].passes > 0 {
        return false;
    }
    let Armed { fault, text, .. } = orders.armed.remove(at);
    orders.note(&format!("fired {text}"));
    drop(orders);
    match fault {
        Fault::Crash => signal(SIGKILL),
        Fault::Stop => signal(SIGSTOP),
        // The mechanism itself, not a wait for something.
        Fault::Pause(time) => std::thread::sleep(time),
        Fault::Error => return true,
    }
    false
}

/// The error of an operation that was told to fail.
pub fn injected() -> io::Error {
    io::Error::other("a failpoint says so")
}

/// To this very thread, so that it does not go on for a moment first.
fn signal(number: i32) {
    raise(number).expect("a process may signal itself");
}

fn parse(text: &str) -> Result<Armed, String> {
    let (name, order) = text.split_once('=').ok_or_else(|| format!("{text:?} is not name=action"))?;
    let point = Point::named(name).ok_or_else(|| format!("there is no point {name:?}"))?;
    let (action, passes) = order.split_once('@').unwrap_or((order, "1"));
    let passes: u64 = passes.parse().map_err(|_| format!("{passes:?} is not a number of passes"))?;
    if passes == 0 {
        return Err("passes are counted from 1".into());
    }
    let fault = match action.split_once(':') {
        None if action == "crash" => Fault::Crash,
        None if action == "stop" => Fault::Stop,
        None if action == "error" && point.can_fail() => Fault::Error,
        Some(("pause", ms)) => {
            Fault::Pause(Duration::from_millis(ms.parse().map_err(|_| format!("{ms:?} is not a number of ms"))?))
        }
        _ => return Err(format!("{action:?} is not an action of {name}")),
    };
    Ok(Armed { point, fault, passes, text: text.to_owned() })
}

fn lock() -> MutexGuard<'static, Orders> {
    ORDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Orders {
    /// One line, in one write, with CLOCK_MONOTONIC in microseconds: it is in the file even if the process dies next.
    fn note(&mut self, text: &str) {
        let now = clock_gettime(ClockId::Monotonic);
        let line = format!("{}{:06} {text}\n", now.tv_sec, now.tv_nsec / 1_000);
        if let Some(log) = &mut self.log {
            log.write_all(line.as_bytes()).expect("the log of failpoints can be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_in_words() {
        let armed = parse("ack.received=pause:400@3").unwrap();
        assert_eq!((armed.point, armed.passes), (Point::AckReceived, 3));
        assert_eq!(armed.fault, Fault::Pause(Duration::from_millis(400)));
        assert_eq!(parse("exit=crash").unwrap().fault, Fault::Crash);
        for wrong in
            ["", "exit", "exit=", "exit=error", "nowhere=crash", "exit=crash@0", "exit=crash@x", "exit=pause:x"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_point_fires_on_the_pass_that_was_ordered_and_on_no_other() {
        lock().armed.push(parse("inbound.kept=error@2").unwrap());
        assert!(!pass(Point::AckSend));
        assert!(!pass(Point::InboundKept));
        assert!(pass(Point::InboundKept));
        assert!(!pass(Point::InboundKept));
    }
}
