//! `ft-primary` with its failpoints; see `failover::failpoint`.

#[path = "../main.rs"]
mod program;

fn main() -> std::process::ExitCode {
    program::main()
}
