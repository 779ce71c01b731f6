//! `FT.DISK` and `FT.FSYNC`.

use alloc::vec::Vec;

use crate::cmdline::size;
use crate::command::{Call, Done, Failure};
use crate::load::{Limit, MAX_BLOCK, MAX_DEPTH, MAX_MILLIS, Pattern, Spec};
use crate::log::SECTOR;
use crate::resp::{Decimal, parse_integer};

/// Bytes of each read or write unless the client says otherwise.
const BLOCK: usize = 4096;
/// Room for the reply of `FT.DISK info`, in bytes.
const INFO_ROOM: usize = 2048;

/// Work on the disks that takes its time: the reply comes when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskJob {
    /// A load.
    Load(Spec),
    /// The digest of each disk.
    Sum,
}

pub(crate) fn fsync(call: &mut Call<'_>) -> Done {
    let Some(keeper) = &mut call.keeper else { return Err(Failure::Text("ERR there is no log: no disk, or disk=off")) };
    if keeper.log.is_broken() {
        return Err(Failure::Io);
    }
    call.until = keeper.log.ticket();
    keeper.log.want(call.until);
    call.ok();
    Ok(())
}

pub(crate) fn disk(call: &mut Call<'_>) -> Done {
    let job = if call.is(1, "info") {
        return info(call);
    } else if call.is(1, "sum") {
        if call.len() != 2 {
            return Err(Failure::Syntax);
        }
        DiskJob::Sum
    } else {
        DiskJob::Load(spec(call)?)
    };
    call.machine.disk(call.session.id, job).map_err(Failure::Text)?;
    call.waits = true;
    Ok(())
}

/// `randwrite|randread|seqwrite COUNT|SECONDSs [BLOCK] [DEPTH] [fsync=N]`
fn spec(call: &Call<'_>) -> Result<Spec, Failure> {
    let pattern = if call.is(1, "randwrite") {
        Pattern::RandomWrite
    } else if call.is(1, "randread") {
        Pattern::RandomRead
    } else if call.is(1, "seqwrite") {
        Pattern::SequentialWrite
    } else {
        return Err(Failure::Text("ERR FT.DISK info, sum, randwrite, randread or seqwrite"));
    };
    let text = |index| str::from_utf8(call.arg(index)).ok();
    let positive = |text: &str| parse_integer(text.as_bytes()).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
    let limit = match text(2).ok_or(Failure::Syntax)?.strip_suffix('s') {
        Some(seconds) => {
            let millis = positive(seconds).and_then(|seconds| seconds.checked_mul(1000));
            Limit::Millis(millis.filter(|millis| *millis <= MAX_MILLIS).ok_or(Failure::OutOfRange)?)
        }
        None => Limit::Count(text(2).and_then(positive).ok_or(Failure::NotInteger)?),
    };
    let mut spec = Spec { pattern, limit, block: BLOCK, depth: 1, fsync: None };
    let mut places = 0;
    for index in 3..call.len() {
        let word = text(index).ok_or(Failure::Syntax)?;
        if let Some(count) = word.strip_prefix("fsync=") {
            spec.fsync = Some(positive(count).ok_or(Failure::NotInteger)?);
            continue;
        }
        places += 1;
        match places {
            1 => {
                let block = size(word).and_then(|bytes| usize::try_from(bytes).ok()).ok_or(Failure::NotInteger)?;
                let fits = block > 0 && block % SECTOR == 0 && block <= MAX_BLOCK;
                spec.block = if fits { block } else { return Err(Failure::OutOfRange) };
            }
            2 => {
                let depth = positive(word).and_then(|depth| usize::try_from(depth).ok()).ok_or(Failure::NotInteger)?;
                spec.depth = if depth <= MAX_DEPTH { depth } else { return Err(Failure::OutOfRange) };
            }
            _ => return Err(Failure::Syntax),
        }
    }
    Ok(spec)
}

fn info(call: &mut Call<'_>) -> Done {
    let mut text = Vec::new();
    text.try_reserve_exact(INFO_ROOM).map_err(|_| Failure::OutOfMemory)?;
    let mut line = |name: &str, value: u64| {
        let number = Decimal::new(i64::try_from(value).unwrap_or(i64::MAX));
        for part in [name.as_bytes(), b":", number.as_bytes(), b"\r\n"] {
            if text.len() + part.len() <= INFO_ROOM {
                text.extend_from_slice(part);
            }
        }
    };
    call.machine.disks(&mut line);
    if let Some(keeper) = &call.keeper {
        let figures = keeper.log.figures();
        line("log_half_bytes", figures.capacity);
        line("log_used_bytes", figures.used);
        line("log_generation", figures.generation);
        line("log_records_replayed", keeper.replayed());
        line("log_changes", keeper.log.ticket());
        line("log_changes_durable", keeper.log.durable());
        line("log_writes", figures.writes);
        line("log_flushes", figures.flushes);
        line("log_compactions", figures.compactions);
        line("log_failed", u64::from(keeper.log.is_broken()));
    }
    call.out.bulk(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Outcome;
    use crate::command::tests::Server;

    #[test]
    fn loads_are_understood() {
        let mut server = Server::new();
        let mut job = |line: &str| {
            let reply = server.ask(line);
            assert_eq!((reply.as_str(), server.outcome), ("", Outcome::Wait), "{line}");
            server.machine.job.take().unwrap()
        };
        assert_eq!(job("FT.DISK sum"), DiskJob::Sum);
        let spec =
            Spec { pattern: Pattern::RandomWrite, limit: Limit::Millis(5000), block: 4096, depth: 1, fsync: None };
        assert_eq!(job("FT.DISK randwrite 5s"), DiskJob::Load(spec));
        let spec =
            Spec { pattern: Pattern::SequentialWrite, limit: Limit::Count(9), block: 65536, depth: 8, fsync: Some(2) };
        assert_eq!(job("FT.DISK SEQWRITE 9 64K 8 fsync=2"), DiskJob::Load(spec));
        assert_eq!(job("FT.DISK seqwrite 9 fsync=2 65536 8"), DiskJob::Load(spec));
        for bad in [
            "FT.DISK",
            "FT.DISK none",
            "FT.DISK sum x",
            "FT.DISK randread",
            "FT.DISK randread 0",
            "FT.DISK randread 5000s",
            "FT.DISK randread 99999999999999999999s",
            "FT.DISK randread 1 513",
            "FT.DISK randread 1 0",
            "FT.DISK randread 1 512K",
            "FT.DISK randread 1 4K 33",
            "FT.DISK randread 1 4K 0",
            "FT.DISK randread 1 4K 1 1",
            "FT.DISK randread 1 fsync=0",
            "FT.FSYNC",
        ] {
            assert!(server.ask(bad).starts_with("-ERR"), "{bad}");
            assert_eq!((server.machine.job, server.outcome), (None, Outcome::Continue));
        }
        assert_eq!(server.ask("FT.DISK info"), "$9|disks:0||");
    }
}
