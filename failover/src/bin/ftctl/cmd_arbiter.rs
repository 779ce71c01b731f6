//! `ftctl arbiter show`: the record as it is, read without any process's help.

use failover::arbiter::{Arbiter, ArbiterError, FileArbiter};
use failover::config::ArbiterSection;
use failover::exit::CtlExit;

use super::Failure;
use super::args::{ArbiterAction, TargetArgs};
use super::target::print;

pub(crate) fn run(target: &TargetArgs, action: ArbiterAction) -> Result<CtlExit, Failure> {
    let ArbiterAction::Show = action;
    let config = target.load()?;
    let ArbiterSection::File { path } = &config.arbiter;
    let wrong = |error: ArbiterError| Failure::new(CtlExit::Unknown, error.to_string());
    let mut arbiter = FileArbiter::open(path).map_err(wrong)?;
    let Some(found) = arbiter.read().map_err(wrong)? else {
        return Err(Failure::new(CtlExit::Down, format!("{}: no record yet", arbiter.describe())));
    };
    let text = serde_json::to_string_pretty(&found).expect("string keys and plain values");
    print(&(text + "\n"));
    if found.record.cluster_id != config.vm.id {
        let text =
            format!("the record is about VM {}, the configuration about {}", found.record.cluster_id, config.vm.id);
        return Err(Failure::new(CtlExit::Config, text));
    }
    Ok(CtlExit::Ok)
}
