//! `ftctl config check`.

use failover::exit::CtlExit;

use super::Failure;
use super::args::{ConfigAction, TargetArgs};
use super::target::print;

pub(crate) fn run(target: &TargetArgs, action: ConfigAction) -> Result<CtlExit, Failure> {
    let ConfigAction::Check = action;
    let config = target.load()?;
    if let Some(node) = &target.node {
        config.pick(node).map_err(|error| Failure::new(CtlExit::Usage, error.to_string()))?;
    }
    let derived: String = config.derived().lines().map(|line| format!("# {line}\n")).collect();
    print(&format!("{}\n# What follows from it:\n{derived}", config.effective()));
    Ok(CtlExit::Ok)
}
