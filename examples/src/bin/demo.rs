//! `cargo demo`: one command, one host, one kill survived.

use std::process::ExitCode;

fn main() -> ExitCode {
    examples::demo::main()
}
