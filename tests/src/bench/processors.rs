//! Who runs on which processor, and for how long. What the kernel does not say is an error: these benchmarks are about nothing else.

use std::fs;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, Pid, sched_setaffinity};

use super::{BenchError, host};

/// Length of the kernel's clock tick in `/proc/stat`: `USER_HZ` is 100 on every architecture that this runs on.
const TICK: Duration = Duration::from_millis(10);

/// How long [`share_busy`] looks: some tens of ticks.
const LOOK: Duration = Duration::from_millis(400);

/// Threads of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// Those that run the guest.
    Vcpus,
    /// All others.
    Others,
}

/// Ids of a process's threads of a kind.
fn threads(process: u32, wanted: Threads) -> Result<Vec<i32>, BenchError> {
    let dir = format!("/proc/{process}/task");
    let mut found = Vec::new();
    for task in fs::read_dir(&dir).map_err(host("/proc/PID/task"))?.flatten() {
        // A thread that has ended meanwhile is none.
        let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
        let kind = if name.starts_with("vcpu") { Threads::Vcpus } else { Threads::Others };
        if kind == wanted {
            found.extend(task.file_name().to_str().and_then(|id| id.parse::<i32>().ok()));
        }
    }
    Ok(found)
}

/// Threads of a kind run on one processor from now on.
///
/// # Errors
/// There is no such processor.
pub fn pin(process: u32, wanted: Threads, processor: usize) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    set.set(processor);
    for id in threads(process, wanted)? {
        match sched_setaffinity(Pid::from_raw(id), &set) {
            // It has ended meanwhile.
            Err(rustix::io::Errno::SRCH) => {}
            other => other.map_err(host("sched_setaffinity"))?,
        }
    }
    Ok(())
}

/// What threads have used, and what they have waited for a processor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// Processor time.
    pub ran: Duration,
    /// Ready to run, without a processor.
    pub waited: Duration,
}

impl Used {
    /// Of a process's threads of a kind.
    ///
    /// # Errors
    /// The process is gone.
    pub fn of(process: u32, wanted: Threads) -> Result<Self, BenchError> {
        let mut sum = Self::default();
        for id in threads(process, wanted)? {
            let Ok(text) = fs::read_to_string(format!("/proc/{process}/task/{id}/schedstat")) else { continue };
            let mut fields = text.split_whitespace().filter_map(|field| field.parse().ok()).map(Duration::from_nanos);
            sum.ran += fields.next().unwrap_or_default();
            sum.waited += fields.next().unwrap_or_default();
        }
        Ok(sum)
    }

    /// Since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { ran: self.ran.saturating_sub(before.ran), waited: self.waited.saturating_sub(before.waited) }
    }
}

/// For how long a processor was not idle since the host's start.
///
/// # Errors
/// There is no such processor.
pub fn busy(processor: usize) -> Result<Duration, BenchError> {
    let text = fs::read_to_string("/proc/stat").map_err(host("/proc/stat"))?;
    busy_in(&text, processor).ok_or_else(|| BenchError::Wrong(format!("/proc/stat has no processor {processor}")))
}

/// How much of all processors' time is used at the moment, by whomever: looked at for a part of a second.
///
/// # Errors
/// The kernel does not say.
pub fn share_busy() -> Result<f64, BenchError> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let all = || (0..processors).map(busy).sum::<Result<Duration, BenchError>>();
    let (before, began) = (all()?, Instant::now());
    std::thread::sleep(LOOK);
    let used = all()?.saturating_sub(before);
    Ok(used.as_secs_f64() / (began.elapsed().as_secs_f64() * processors as f64))
}

fn busy_in(stat: &str, processor: usize) -> Option<Duration> {
    let name = format!("cpu{processor}");
    let line = stat.lines().find(|line| line.split_whitespace().next() == Some(&name))?;
    let ticks: Vec<u32> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user time already.
    let busy = |at: &usize| ticks.get(*at).copied().unwrap_or_default();
    Some(TICK * [0, 1, 2, 5, 6, 7].iter().map(busy).sum::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy() {
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 10 20 30 1000 1000 1 2 3 7 0\nintr 1\n";
        assert_eq!(busy_in(stat, 1), Some(Duration::from_millis(660)));
        assert_eq!(busy_in(stat, 2), None);
    }

    #[test]
    fn threads_have_used_something() {
        let me = Used::of(std::process::id(), Threads::Others).unwrap();
        assert!(me.ran > Duration::ZERO);
        assert_eq!(me.since(me).ran, Duration::ZERO);
        assert!(threads(std::process::id(), Threads::Vcpus).unwrap().is_empty());
    }
}
