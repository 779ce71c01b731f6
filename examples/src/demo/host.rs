//! What the host must have, asked before anything is built.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::geteuid;
use tests::real::tools;

use super::args::{Arbiter, Args, Machine};
use super::error::DemoError;

/// Set in the environment of the second start, so that there is no third.
const IN_USER_NAMESPACE: &str = "FT_DEMO_IN_USER_NAMESPACE";

/// Whether we are root only inside a user namespace.
pub(super) fn in_user_namespace() -> bool {
    std::env::var_os(IN_USER_NAMESPACE).is_some()
}

/// Network namespaces need root, or a user namespace in which we are root: starts the program again in one.
pub(super) fn enter_user_namespace_unless_root() -> Result<(), DemoError> {
    if geteuid().is_root() || in_user_namespace() {
        return Ok(());
    }
    tools::require("unshare")?;
    anstream::eprintln!("demo: not root, so everything runs in a user namespace");
    let exe =
        std::env::current_exe().map_err(|e| DemoError::Host(format!("cannot tell where this program is: {e}")))?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--"]).arg(exe).args(std::env::args_os().skip(1));
    let error = command.env(IN_USER_NAMESPACE, "1").exec();
    Err(DemoError::Host(format!("cannot start unshare: {error}; run the demo as root")))
}

/// Checks for programs and devices, so that what is missing is said at once.
pub(super) fn check(args: &Args) -> Result<(), DemoError> {
    tools::require("ip")?;
    if args.arbiter == Arbiter::Etcd {
        tools::require("etcd")?;
    }
    let open = |path: &str| File::options().read(true).write(true).open(path);
    if args.machine == Machine::Kvm {
        open("/dev/kvm").map_err(DemoError::NoKvm)?;
    }
    open("/dev/net/tun").map(drop).map_err(|e| {
        DemoError::Host(format!(
            "cannot use /dev/net/tun ({e}): the guest's network needs it; run as root, or `modprobe tun`"
        ))
    })
}
