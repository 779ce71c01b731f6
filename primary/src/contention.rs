//! For how long the guest's vCPU threads were ready to run and had no processor, as the kernel counts it: what everything else on this host, the copying
//! of a base among it, costs the guest.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How the vCPUs' threads are called.
const VCPU_THREAD: &str = "vcpu";

/// The vCPUs' threads of this process.
#[derive(Debug, Default)]
pub struct Vcpus {
    schedstat: Vec<std::path::PathBuf>,
}

impl Vcpus {
    /// Looks for them; none are found where `/proc` is not what it is on Linux.
    pub fn find() -> Self {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let vcpus = tasks.filter(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with(VCPU_THREAD))
        });
        Self { schedstat: vcpus.map(|task| task.path().join("schedstat")).collect() }
    }

    /// Processor time that everything else of this process has used: what the copying of a base takes, on whichever thread. Time in which the copy
    /// itself waits for a processor costs the guest nothing.
    pub fn others_ran(&self) -> Duration {
        let all = clock_gettime(ClockId::ProcessCPUTime);
        let all = Duration::new(u64::try_from(all.tv_sec).unwrap_or(0), u32::try_from(all.tv_nsec).unwrap_or(0));
        let vcpus = self.schedstat.iter().filter_map(|path| ran_ns(&fs::read_to_string(path).ok()?));
        all.saturating_sub(Duration::from_nanos(vcpus.fold(0, u64::saturating_add)))
    }

    /// Processor time that they have used in their lives, on average; `None` when the kernel does not say.
    pub fn ran(&self) -> Option<Duration> {
        self.average(ran_ns)
    }

    /// For how long they have waited for a processor in their lives, on average; `None` when the kernel does not say.
    pub fn waited(&self) -> Option<Duration> {
        self.average(waited_ns)
    }

    fn average(&self, field: fn(&str) -> Option<u64>) -> Option<Duration> {
        let count = u64::try_from(self.schedstat.len()).ok().filter(|count| *count > 0)?;
        let mut sum = 0_u64;
        for path in &self.schedstat {
            sum = sum.saturating_add(field(&fs::read_to_string(path).ok()?)?);
        }
        Some(Duration::from_nanos(sum / count))
    }
}

/// The second field: time on a run queue, in nanoseconds.
fn waited_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The first field: time on a processor, in nanoseconds.
fn ran_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threads_are_found_by_their_name() {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("vcpu7".into()).spawn(move || told.recv().ok()).unwrap();
        let mut vcpus = Vcpus::find();
        while vcpus.schedstat.is_empty() {
            // A thread gets its name when it runs for the first time.
            std::thread::yield_now();
            vcpus = Vcpus::find();
        }
        assert!(vcpus.waited().is_some());
        drop(tell);
        thread.join().unwrap();
        assert_eq!(vcpus.waited(), None, "it is gone");
        assert_eq!((waited_ns("12 345 6\n"), waited_ns("12"), waited_ns("")), (Some(345), None, None));
        assert_eq!((ran_ns("12 345 6\n"), ran_ns("x")), (Some(12), None));
        let (before, began) = (Vcpus::default().others_ran(), std::time::Instant::now());
        while Vcpus::default().others_ran() == before {
            assert!(began.elapsed() < Duration::from_secs(20), "this loop uses processor time");
        }
    }
}
