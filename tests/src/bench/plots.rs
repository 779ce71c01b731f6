//! Which charts a set of results gives.

use std::path::Path;

use super::BenchError;
use super::chart::{Axis, Chart, Series};
use super::{latency, pause, strategies, throughput, tracking, wire};

fn line(colour: usize, name: impl Into<String>, points: Vec<(f64, f64)>) -> Series {
    Series { name: name.into(), points, dashed: false, colour }
}

fn dashed(colour: usize, name: impl Into<String>, points: Vec<(f64, f64)>) -> Series {
    Series { name: name.into(), points, dashed: true, colour }
}

const fn linear(name: &'static str) -> Axis {
    Axis { name, log: false }
}

const fn log(name: &'static str) -> Axis {
    Axis { name, log: true }
}

/// The different values, in the order in which they come.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// Pause and floor against dirty pages, for each size of RAM and number of vCPUs.
pub(super) fn pause(report: &pause::Report) -> Chart {
    let mut series = Vec::new();
    let machines = distinct(report.rows.iter().map(|row| (row.memory_bytes, row.vcpus)));
    for (colour, (memory, vcpus)) in machines.into_iter().enumerate() {
        let rows = || report.rows.iter().filter(move |row| (row.memory_bytes, row.vcpus) == (memory, vcpus));
        let points = |of: fn(&pause::Row) -> f64| rows().map(|row| (row.dirty_pages.p50, of(row))).collect();
        let name = format!("{} MiB, {vcpus} vCPU", memory >> 20);
        series.push(line(colour, format!("pause, {name}"), points(|row| row.pause_us.p50)));
        series.push(dashed(colour, format!("floor, {name}"), points(|row| row.floor_us.p50)));
    }
    let title = "Pause until the guest was seen to run, p50".into();
    Chart { title, x: log("dirty pages"), y: log("us"), series }
}

/// Replies by mode: so many of a hundred take at most so long.
pub(super) fn latency(report: &latency::Report) -> Chart {
    let curve = |(colour, row): (usize, &latency::Row)| {
        line(colour, &row.mode, row.curve_us.iter().map(|point| (point.value, point.percent)).collect())
    };
    let series = report.rows.iter().enumerate().map(curve).collect();
    let title = format!("Reply to one INCR at a time, {} pages dirtied a second", report.dirty_pages_per_second);
    Chart { title, x: log("us"), y: linear("% of the replies take at most that long"), series }
}

/// Requests a second by length of epoch; those without epochs, or with epochs that follow the work, beside it.
pub(super) fn throughput(report: &throughput::Report) -> Chart {
    let lengths: Vec<f64> = report.rows.iter().filter_map(|row| millis(&row.mode)).collect();
    let (first, last) =
        (lengths.iter().copied().fold(f64::INFINITY, f64::min), lengths.iter().copied().fold(0.0, f64::max));
    let mut series = Vec::new();
    for (connections, pipeline) in distinct(report.rows.iter().map(|row| (row.connections, row.pipeline))) {
        let load = format!("-c {connections} -P {pipeline}");
        let rows = || report.rows.iter().filter(move |row| (row.connections, row.pipeline) == (connections, pipeline));
        let mut points: Vec<(f64, f64)> =
            rows().filter_map(|row| Some((millis(&row.mode)?, row.requests_per_second))).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        series.push(line(series.len(), format!("fixed, {load}"), points));
        for row in rows().filter(|row| millis(&row.mode).is_none()) {
            let points = [first, last].map(|length| (length, row.requests_per_second)).to_vec();
            series.push(dashed(series.len(), format!("{}, {load}", row.mode), points));
        }
    }
    let title = "redis-benchmark SET".into();
    Chart { title, x: log("length of an epoch, ms"), y: log("requests a second"), series }
}

/// The length of a mode's epochs in milliseconds, if it has one.
fn millis(mode: &str) -> Option<f64> {
    mode.split_whitespace().next()?.strip_suffix("ms")?.parse().ok()
}

/// Bytes on the wire by what changed in a page.
pub(super) fn wire(report: &wire::Report) -> Chart {
    let share = |change: wire::Change| change.bytes() as f64 / replication_proto::limits::PAGE_BYTES as f64 * 100.0;
    let points = |patches: bool, scattered: bool| {
        let wanted =
            move |line: &&wire::Line| line.patches == patches && (line.change == wire::Change::Scattered) == scattered;
        let lines = report.lines.iter().filter(wanted);
        let mut points: Vec<(f64, f64)> = lines.map(|line| (share(line.change), line.wire_ratio * 100.0)).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        points
    };
    let series = vec![
        line(0, "patches, one place", points(true, false)),
        line(1, "patches, 64 bytes all over", points(true, true)),
        dashed(2, "whole pages", points(false, false)),
    ];
    let title = format!("Checkpoints of {} pages on the wire", report.pages);
    Chart { title, x: linear("% of each page changed"), y: linear("wire, % of the pages' bytes"), series }
}

/// Pauses of the ways to capture, by what the guest dirties.
pub(super) fn strategies(report: &strategies::Report) -> Chart {
    let protected = || report.rows.iter().filter(|row| row.pause_us.p50 > 0.0);
    let names = distinct(protected().map(|row| row.strategy.clone()));
    let series = names.into_iter().enumerate().map(|(colour, strategy)| {
        let rows = protected().filter(|row| row.strategy == strategy);
        let points = rows.map(|row| (f64::from(row.dirty_pages_per_second), row.pause_us.p50)).collect();
        line(colour, strategy, points)
    });
    let title = format!("Pause by way of capture, [epoch] {}, p50", report.epoch);
    Chart { title, x: log("pages dirtied a second"), y: log("us"), series: series.collect() }
}

/// What each way to know which pages were written costs in an epoch.
pub(super) fn tracking(report: &tracking::Report) -> Chart {
    let offered = || report.rows.iter().filter(|row| row.offered);
    let methods = distinct(offered().map(|row| row.method));
    let series = methods.into_iter().enumerate().map(|(colour, method)| {
        let rows = offered().filter(|row| row.method == method);
        line(colour, method.text(), rows.map(|row| (f64::from(row.pages), row.per_epoch_us.p50)).collect())
    });
    let title = "The guest's writes and the collecting of their pages, one epoch, p50".into();
    Chart { title, x: log("pages written"), y: log("us"), series: series.collect() }
}

/// Draws a chart into a directory under the name of its subcommand.
pub(super) fn draw(chart: &Chart, out: &Path, name: &str) -> Result<bool, BenchError> {
    chart.write(&out.join(format!("{name}.png")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_with_a_clock_have_a_length() {
        let found = ["25ms", "100ms in_flight=3", "latency=2ms", "unprotected", ""].map(millis);
        assert_eq!(found, [Some(25.0), Some(100.0), None, None, None]);
        assert_eq!(distinct([1, 2, 1, 3, 2].into_iter()), [1, 2, 3]);
    }
}
