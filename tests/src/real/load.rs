//! The demo guest's load on its disks, as a client reads its report.

use std::io;
use std::time::Duration;

use super::resp::{Connection, Reply};

/// What `FT.DISK randwrite`, `randread` or `seqwrite` reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Reads or writes.
    pub ios: u64,
    /// Bytes read or written.
    pub bytes: u64,
    /// How long it took, by the guest's clock.
    pub elapsed: Duration,
    /// Reads or writes in a second.
    pub iops: u64,
    /// Time of a read or write that half of them did not exceed.
    pub p50: Duration,
    /// That 99 of 100 did not exceed.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
    /// Flushes.
    pub flushes: u64,
    /// Time of a flush that half of them did not exceed.
    pub flush_p50: Duration,
    /// That 99 of 100 did not exceed.
    pub flush_p99: Duration,
    /// The longest.
    pub flush_max: Duration,
    /// Requests that the disk refused.
    pub errors: u64,
}

impl LoadReport {
    /// Runs a load: the words after `FT.DISK`. The connection's patience has to be longer than the load.
    pub fn run(connection: &mut Connection, words: &[&str]) -> io::Result<Self> {
        let command: Vec<&str> = ["FT.DISK"].into_iter().chain(words.iter().copied()).collect();
        Self::parse(&connection.call(&command)?)
    }

    /// Reads a report: names and numbers in turn. Names that are not known are passed over.
    pub fn parse(reply: &Reply) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not a report of a load: {reply:?}"));
        let Reply::Array(items) = reply else { return Err(bad()) };
        let (mut report, mut known) = (Self::default(), 0);
        for pair in items.chunks(2) {
            let [Reply::Bulk(Some(name)), Reply::Integer(value)] = pair else { return Err(bad()) };
            let value = u64::try_from(*value).map_err(|_| bad())?;
            let time = Duration::from_micros(value);
            known += 1;
            match name.as_slice() {
                b"ios" => report.ios = value,
                b"bytes" => report.bytes = value,
                b"elapsed_us" => report.elapsed = time,
                b"iops" => report.iops = value,
                b"p50_us" => report.p50 = time,
                b"p99_us" => report.p99 = time,
                b"max_us" => report.max = time,
                b"flushes" => report.flushes = value,
                b"flush_p50_us" => report.flush_p50 = time,
                b"flush_p99_us" => report.flush_p99 = time,
                b"flush_max_us" => report.flush_max = time,
                b"errors" => report.errors = value,
                _ => known -= 1,
            }
        }
        if known == 12 { Ok(report) } else { Err(bad()) }
    }
}

/// Asks for the digests of the guest's disks: XXH3 with 128 bits, in hexadecimal, as [`digest`] computes it.
pub fn disk_sums(connection: &mut Connection) -> io::Result<Vec<String>> {
    let reply = connection.call(&["FT.DISK", "sum"])?;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not the digests of disks: {reply:?}"));
    let Reply::Array(items) = &reply else { return Err(bad()) };
    let text = |item: &Reply| match item {
        Reply::Bulk(Some(digest)) => String::from_utf8(digest.clone()).map_err(|_| bad()),
        _ => Err(bad()),
    };
    items.iter().map(text).collect()
}

/// The digest of an image, as the guest computes it.
#[must_use]
pub fn digest(image: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(image))
}

/// Asks for one of the lines of `FT.DISK info`.
pub fn disk_info(connection: &mut Connection, name: &str) -> io::Result<u64> {
    let reply = connection.call(&["FT.DISK", "info"])?;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("no {name} in {reply:?}"));
    let Reply::Bulk(Some(text)) = &reply else { return Err(bad()) };
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(known, _)| *known == name).and_then(|(_, value)| value.parse().ok()).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(fields: &[(&str, i64)]) -> Reply {
        let pair = |(name, value): &(&str, i64)| [Reply::Bulk(Some(name.as_bytes().to_vec())), Reply::Integer(*value)];
        Reply::Array(fields.iter().flat_map(pair).collect())
    }

    const FIELDS: [(&str, i64); 12] = [
        ("ios", 1),
        ("bytes", 2),
        ("elapsed_us", 3),
        ("iops", 4),
        ("p50_us", 5),
        ("p99_us", 6),
        ("max_us", 7),
        ("flushes", 8),
        ("flush_p50_us", 9),
        ("flush_p99_us", 10),
        ("flush_max_us", 11),
        ("errors", 12),
    ];

    #[test]
    fn reports_are_read() {
        let mut fields = FIELDS.to_vec();
        fields.push(("new", 13));
        let read = LoadReport::parse(&report(&fields)).unwrap();
        assert_eq!((read.ios, read.elapsed, read.errors), (1, Duration::from_micros(3), 12));
        assert_eq!((read.p99, read.flush_max), (Duration::from_micros(6), Duration::from_micros(11)));
    }

    #[test]
    fn other_answers_are_errors() {
        let mut negative = FIELDS;
        negative[3].1 = -1;
        for reply in [
            report(&FIELDS[1..]),
            report(&negative),
            Reply::Error("BUSY".into()),
            Reply::Array(vec![Reply::Integer(1)]),
            Reply::Array(vec![Reply::Bulk(None), Reply::Integer(1)]),
        ] {
            assert!(LoadReport::parse(&reply).is_err(), "{reply:?}");
        }
    }
}
