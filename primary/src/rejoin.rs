//! A process that begins anew as the program that waits: in the same place of the service manager's tree, with a new incarnation. Nothing of what it
//! held goes along but its arguments; the kernel closes all that was open.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use failover::decide::Role;

/// Becomes `ft-backup`, which lies beside the running program. Returns only when that fails.
///
/// # Errors
/// Always: why this process could not become that program.
pub fn become_backup(config: &Path, node: &str, role: Role) -> io::Error {
    let program = match std::env::current_exe() {
        Ok(program) => program.with_file_name("ft-backup"),
        Err(error) => return error,
    };
    let mut command = Command::new(&program);
    command.arg("--config").arg(config).arg("--node").arg(node);
    // What this process might have become, the next one may become, too.
    if role == Role::Primary {
        command.arg("--may-boot");
    }
    // What was armed from the start was for this life.
    #[cfg(feature = "failpoints")]
    command.env_remove("FAILPOINTS");
    let error = command.exec();
    io::Error::new(error.kind(), format!("cannot become {}: {error}", program.display()))
}
