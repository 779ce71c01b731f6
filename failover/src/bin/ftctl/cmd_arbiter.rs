//! `ftctl arbiter show`: the record as it is, read without any process's help.

use std::fmt::Write as _;
use std::time::Instant;

use failover::arbiter::etcd::EtcdFacts;
use failover::arbiter::{Arbiter, ArbiterError, ConfiguredArbiter, NodeRef, Versioned};
use failover::exit::CtlExit;
use serde_json::{Value, json};

use super::Failure;
use super::args::{ArbiterAction, TargetArgs};
use super::target::print;

pub(crate) fn run(target: &TargetArgs, action: ArbiterAction) -> Result<CtlExit, Failure> {
    let ArbiterAction::Show { json } = action;
    let config = target.load()?;
    let wrong = |error: ArbiterError| Failure::new(CtlExit::Unknown, plain(&error.to_string()));
    let mut arbiter = ConfiguredArbiter::open(&config.arbiter, config.vm.id).map_err(wrong)?;
    // The first request also opens the connection and looks at the server; the second one is what a takeover would wait for.
    arbiter.read().map_err(wrong)?;
    let started = Instant::now();
    let found = arbiter.read().map_err(wrong)?;
    let latency_seconds = started.elapsed().as_secs_f64();
    let place = Place { arbiter: &arbiter, latency_seconds };
    print(&if json { place.to_json(found.as_ref()) } else { place.to_table(found.as_ref()) });
    let Some(found) = found else {
        return Err(Failure::new(CtlExit::Down, format!("{}: no record yet", arbiter.describe())));
    };
    if found.record.cluster_id != config.vm.id {
        let text =
            format!("the record is about VM {}, the configuration about {}", found.record.cluster_id, config.vm.id);
        return Err(Failure::new(CtlExit::Config, text));
    }
    Ok(CtlExit::Ok)
}

/// Text that came from elsewhere, on one line.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Where the record is, and how that answered.
struct Place<'a> {
    arbiter: &'a ConfiguredArbiter,
    latency_seconds: f64,
}

impl Place<'_> {
    fn etcd(&self) -> Option<EtcdFacts> {
        match self.arbiter {
            ConfiguredArbiter::File(_) => None,
            ConfiguredArbiter::Etcd(arbiter) => Some(arbiter.facts()),
        }
    }

    fn to_json(&self, found: Option<&Versioned>) -> String {
        let etcd = self.etcd().map_or(Value::Null, |facts| {
            json!({ "endpoint": facts.endpoint, "key": facts.key, "server": facts.server, "advice": facts.advice })
        });
        let value = json!({
            "schema": "ft.arbiter/1",
            "place": self.arbiter.describe(),
            "etcd": etcd,
            "latency_seconds": self.latency_seconds,
            "revision": found.map(|found| found.revision),
            "record": found.map(|found| &found.record),
        });
        serde_json::to_string_pretty(&value).expect("string keys and plain values") + "\n"
    }

    fn to_table(&self, found: Option<&Versioned>) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            writeln!(out, "{name:<11} {}", plain(&value)).expect("a string takes everything");
        };
        line("place", self.arbiter.describe());
        if let Some(EtcdFacts { endpoint, key, server, advice, latency: _ }) = self.etcd() {
            line("endpoint", endpoint);
            line("key", key);
            line("server", server.map_or("version unknown".into(), |version| format!("etcd {version}")));
            if let Some(advice) = advice {
                line("advice", advice);
            }
        }
        line("latency", format!("{:.1} ms", self.latency_seconds * 1e3));
        let Some(Versioned { revision, record }) = found else {
            line("record", "none yet".into());
            return out;
        };
        let nobody = || "nobody: no takeover would be granted".to_owned();
        line("revision", revision.to_string());
        line("VM", record.cluster_id.to_string());
        line("generation", record.generation.to_string());
        line("owner", record.owner.to_string());
        line("in sync", record.in_sync.as_ref().map_or_else(nobody, NodeRef::to_string));
        line("reason", record.reason.word().into());
        line("written by", record.written_by.to_string());
        line("note", record.note.clone());
        out
    }
}
