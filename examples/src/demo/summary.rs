//! Many runs, shown.

use super::outcome::{Outcome, Parts};
use super::screen::{BAD, BOLD, FAINT, GOOD};

/// One line for one run of many.
pub(super) fn print_line(number: u32, of: u32, outcome: &Outcome) {
    let Parts { detect, arbitrate, activate, first_reply, gap } = outcome.parts();
    let (word, style) = if outcome.passed() { ("ok", GOOD) } else { ("FAILED", BAD) };
    anstream::println!(
        "  {number:>4}/{of} {style}{word:<6}{style:#} gap {gap:>7.1} ms {FAINT}= detect {detect:.1} + arbitrate {arbitrate:.1} + activate {activate:.1} + first reply \
         {first_reply:.1}{FAINT:#}  acked {} lost {} wrong {} {FAINT}seed {}{FAINT:#}",
        outcome.report.acks.len(),
        outcome.report.lost(),
        outcome.report.wrong(),
        outcome.seed,
    );
    if let Some(files) = &outcome.files {
        anstream::println!(
            "       {BAD}{}{BAD:#} files: {files}",
            outcome.report.connection_error.as_deref().unwrap_or("")
        );
    }
}

/// Percentiles over all runs, and the verdict.
pub(super) fn print(outcomes: &[Outcome]) {
    let passed = outcomes.iter().filter(|o| o.passed()).count();
    anstream::println!("\n  {BOLD}{:<14}{:>9}{:>9}{:>9}   ms{BOLD:#}", "", "p50", "p99", "max");
    for (name, values) in distributions(outcomes) {
        let at = |q| percentile(&values, q);
        anstream::println!("  {:<14}{:>9.1}{:>9.1}{:>9.1}", name.replace('_', " "), at(50), at(99), at(100));
    }
    let lost: u64 = outcomes.iter().map(|o| o.report.lost()).sum();
    let wrong: u64 = outcomes.iter().map(|o| o.report.wrong()).sum();
    let acked: usize = outcomes.iter().map(|o| o.report.acks.len()).sum();
    let style = if passed == outcomes.len() { GOOD } else { BAD };
    anstream::println!(
        "\n  {style}{passed} of {} runs passed{style:#}; {acked} acknowledged, {lost} lost, {wrong} wrong",
        outcomes.len()
    );
}

/// Every part's values over all runs, sorted.
pub(super) fn distributions(outcomes: &[Outcome]) -> Vec<(&'static str, Vec<f64>)> {
    let names = ["detect", "arbitrate", "activate", "first_reply", "gap"];
    let column = |index: usize| {
        let mut values: Vec<f64> = outcomes.iter().map(|o| o.parts().named()[index].1).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    names.into_iter().enumerate().map(|(index, name)| (name, column(index))).collect()
}

/// The smallest value that `percent` of all are not above (nearest rank). NaN, which sorts last, says that something never happened.
pub(super) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn nearest_rank() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!([50, 75, 76, 99, 100].map(|p| percentile(&values, p)), [2.0, 3.0, 4.0, 4.0, 4.0]);
        assert_eq!(percentile(&[7.0], 1), 7.0);
        assert!(percentile(&[], 50).is_nan());
    }
}
