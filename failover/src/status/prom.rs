//! Metrics in OpenMetrics text, which Prometheus reads. Base units, no labels of high cardinality.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::{Distribution, Status};
use crate::decide::StateName;

#[derive(Debug)]
struct Scrape(Status);

/// The metrics of one status.
pub(super) fn render(status: &Status) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape(status.clone())));
    let mut out = String::new();
    text::encode(&mut out, &registry).expect("writing to a string does not fail");
    out
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> Result<(), Error> {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

fn whole(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), Error> {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

fn flag(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: bool) -> Result<(), Error> {
    whole(encoder, name, help, u64::from(value))
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> Result<(), Error> {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
}

fn labelled<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'a str, u64)>,
) -> Result<(), Error> {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (word, value) in values {
        let labels = [(label, word)];
        let metric = family.encode_family(&labels)?;
        match kind {
            MetricType::Counter => ConstCounter::new(value).encode(metric)?,
            _ => ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)?,
        }
    }
    Ok(())
}

fn histogram(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, of: &Distribution) -> Result<(), Error> {
    let bounds = Distribution::BOUNDS.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(of.buckets.iter().copied()).collect();
    encoder.encode_descriptor(name, help, None, MetricType::Histogram)?.encode_histogram::<NoLabelSet>(
        of.sum_seconds,
        of.count,
        &buckets,
        None,
    )
}

impl Scrape {
    fn state(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let s = &self.0;
        let info = Info::new([("version", s.version.as_str()), ("machine", s.machine.as_str())]);
        info.encode(e.encode_descriptor("ft_build", "Version of the program", None, info.metric_type())?)?;
        let roles = ["primary", "backup"].into_iter().map(|role| (role, u64::from(role == s.role.word())));
        labelled(e, MetricType::Gauge, "ft_role", "Role of this process", "role", roles)?;
        let states = StateName::ALL.into_iter().map(|state| (state.word(), u64::from(state == s.state)));
        labelled(e, MetricType::Gauge, "ft_state", "State of this process", "state", states)?;
        flag(e, "ft_protected", "Every output that leaves is covered by a committed backup", s.protected)?;
        flag(e, "ft_failover_armed", "A takeover now would be granted", s.armed)?;
        flag(e, "ft_link_up", "The data connection stands", s.link.up)?;
        flag(e, "ft_link_insecure", "The link is neither authenticated nor encrypted", s.link.insecure)?;
        whole(e, "ft_generation", "Number of the right to run", s.generation)?;
        whole(e, "ft_epoch_number", "Last epoch ended or committed", s.epoch)?;
        whole(e, "ft_backup_lag_epochs", "Epochs that are not committed yet", s.lag_epochs)?;
        gauge(e, "ft_state_seconds", "Time in this state", s.state_seconds)?;
        let unprotected = ConstCounter::new(s.unprotected_seconds_total);
        let help = "Time that the guest ran unprotected";
        unprotected.encode(e.encode_descriptor("ft_unprotected_seconds", help, None, unprotected.metric_type())?)?;
        whole(e, "ft_resync_remaining_bytes", "Bytes of the base still to be copied", s.resync_remaining_bytes)?;
        for (name, help, value) in [
            ("ft_last_commit_age_seconds", "Age of the newest committed epoch", s.lag_seconds),
            ("ft_peer_seen_age_seconds", "Time since the peer was heard", s.peer.seen_age_seconds),
            ("ft_peer_rtt_seconds", "Round trip of a heartbeat", s.link.rtt_seconds),
            ("ft_arbiter_age_seconds", "Time since the arbiter gave a usable answer", s.arbiter.age_seconds),
            (
                "ft_arbiter_request_seconds",
                "Duration of the last request to the arbiter",
                s.arbiter.last_request_seconds,
            ),
        ] {
            if let Some(value) = value {
                gauge(e, name, help, value)?;
            }
        }
        Ok(())
    }

    fn capture(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let capture = &self.0.capture;
        let strategies = ["postponed", "stop-and-copy", "copy-on-write", "auto"];
        let strategies = strategies.into_iter().map(|name| (name, u64::from(name == capture.strategy)));
        labelled(e, MetricType::Gauge, "ft_capture", "How pages come out of the guest", "strategy", strategies)?;
        let epochs = [("precopied", capture.precopied_epochs_total), ("protected", capture.protected_epochs_total)];
        let help = "Checkpoints with pages copied before the pause, or protected in it";
        labelled(e, MetricType::Counter, "ft_capture_epochs", help, "how", epochs.into_iter())?;
        let pages = [
            ("precopied", capture.precopied_pages_total),
            ("precopied_again", capture.precopied_again_total),
            ("protected", capture.protected_pages_total),
            ("copied_on_write", capture.copied_on_write_total),
        ];
        let help = "Pages copied before a pause, again in it; protected in it, and copied on write";
        labelled(e, MetricType::Counter, "ft_capture_pages", help, "how", pages.into_iter())
    }

    fn work(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let (output, counters, timings) = (&self.0.output, &self.0.counters, &self.0.timings);
        whole(e, "ft_output_buffer_frames", "Frames held", output.held_frames)?;
        whole(e, "ft_output_buffer_bytes", "Bytes held", output.held_bytes)?;
        whole(e, "ft_output_buffer_limit_bytes", "Most bytes that may be held", output.limit_bytes)?;
        let frames = [("released", output.released_frames_total), ("dropped", output.dropped_frames_total)];
        labelled(e, MetricType::Counter, "ft_output_frames", "Frames by fate", "action", frames.into_iter())?;
        let epochs = [("committed", counters.epochs_committed), ("aborted", counters.epochs_aborted)];
        labelled(e, MetricType::Counter, "ft_epochs", "Epochs by result", "result", epochs.into_iter())?;
        let bytes = [("raw", counters.replication_raw_bytes), ("wire", counters.replication_wire_bytes)];
        labelled(e, MetricType::Counter, "ft_replication_bytes", "Bytes of the stream", "stage", bytes.into_iter())?;
        counter(e, "ft_dirty_pages", "Dirty pages of all epochs", counters.dirty_pages)?;
        counter(e, "ft_fenced", "Times that this side was fenced", counters.fenced)?;
        counter(e, "ft_arbiter_errors", "Requests to the arbiter that failed", counters.arbiter_errors)?;
        let causes = counters.failovers.iter().map(|(cause, count)| (cause.as_str(), *count));
        labelled(e, MetricType::Counter, "ft_failovers", "Guests activated here", "cause", causes)?;
        let codes = counters.protocol_errors.iter().map(|(code, count)| (code.as_str(), *count));
        labelled(e, MetricType::Counter, "ft_protocol_errors", "Frames and connections refused", "code", codes)?;
        let pacing = &self.0.pacing;
        let modes = ["fixed", "latency", "overhead"].into_iter().map(|mode| (mode, u64::from(mode == pacing.mode)));
        labelled(e, MetricType::Gauge, "ft_pacing", "What decides when epochs end", "mode", modes)?;
        gauge(e, "ft_epochs_per_second", "Checkpoints in the last second or so", pacing.epochs_per_second)?;
        gauge(e, "ft_guest_lost_ratio", "Part of the guest's time lost to pauses lately", pacing.guest_lost_ratio)?;
        gauge(e, "ft_reply_added_p99_seconds", "What replies waited lately", pacing.reply_added_p99_seconds)?;
        if let Some(met) = pacing.met {
            flag(e, "ft_pacing_target_met", "The target of the pacing is met", met)?;
        }
        let overload = &self.0.overload;
        flag(e, "ft_overloaded", "Link or backup is slower than the guest writes memory", overload.overloaded)?;
        counter(e, "ft_overloads", "Times that an overload began", overload.count)?;
        gauge(e, "ft_throttle_ratio", "Part of its time that the guest is kept from running", overload.throttle_ratio)?;
        gauge(e, "ft_blocked_ratio", "Part of its time that an epoch waited for room to end", overload.blocked_ratio)?;
        self.capture(e)?;
        histogram(e, "ft_epoch_pause_seconds", "Guest paused for a checkpoint", &timings.pause)?;
        histogram(e, "ft_epoch_transfer_seconds", "Encoding and sending a checkpoint", &timings.transfer)?;
        histogram(e, "ft_epoch_ack_seconds", "From the last byte sent to the ack", &timings.ack)?;
        histogram(e, "ft_output_hold_seconds", "Output held", &timings.output_hold)?;
        histogram(e, "ft_failover_duration_seconds", "From evidence to the guest running here", &timings.failover)
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        self.state(&mut encoder)?;
        self.work(&mut encoder)
    }
}
