//! Power cuts at random moments, one pair each: `cargo crash -- --cuts 500`.

use std::process::ExitCode;

use clap::Parser;
use tests::real::crash::{artifacts, cut_once};

/// Kills hosts at random moments under write load, with power cuts that lose what was not synced, and looks for acknowledged writes in the images.
#[derive(Parser)]
#[command(name = "ftcrash", version)]
struct Args {
    /// How many pairs.
    #[arg(long, default_value_t = 20)]
    cuts: u64,
    /// Seed of the first.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let artifacts = artifacts()?;
    let (mut acked, mut after, mut bad) = (0, 0, 0);
    for seed in args.seed..args.seed + args.cuts {
        let found = cut_once(&artifacts, seed)?;
        let wrong = found.missing + found.missing_there;
        let verdict = if wrong == 0 { "ok" } else { "LOST" };
        println!(
            "{verdict:4} seed {seed} {:?}: {} acknowledged, {} after the first cut; missing {} and {}",
            found.cut, found.acked, found.acked_after, found.missing, found.missing_there
        );
        acked += found.acked;
        after += found.acked_after;
        bad += usize::from(wrong > 0);
    }
    println!(
        "{} cuts, {acked} writes acknowledged with a flush ({after} after the first cut), {bad} cuts with a loss",
        args.cuts
    );
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
