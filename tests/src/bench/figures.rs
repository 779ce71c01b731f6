//! Distributions of what was measured.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::table::short;

/// A distribution, in the unit of the field that holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of durations, in microseconds. Nearest rank; zero for none.
    #[must_use]
    pub fn of_us(values: impl Iterator<Item = Duration>) -> Self {
        Self::of(values.map(|d| d.as_secs_f64() * 1e6).collect())
    }

    /// The medians of several runs' points; the largest of all as `max`.
    #[must_use]
    pub fn of_runs(runs: impl Iterator<Item = Self> + Clone) -> Self {
        let middle = |point: fn(&Self) -> f64| median(runs.clone().map(|run| point(&run)).collect());
        let max = runs.clone().map(|run| run.max).fold(0.0, f64::max);
        Self { p50: middle(|run| run.p50), p99: middle(|run| run.p99), max }
    }

    /// How far the 99th percentile is from the median; zero for none.
    #[must_use]
    pub fn tail(&self) -> f64 {
        ratio(self.p99, self.p50)
    }

    /// Its points as cells of a table.
    #[must_use]
    pub fn cells(&self) -> Vec<String> {
        [self.p50, self.p99, self.max].map(short).to_vec()
    }

    /// Of numbers as they are. Nearest rank; zero for none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let rank = |per_cent: usize| {
            let rank = (values.len() * per_cent).div_ceil(100).saturating_sub(1);
            values.get(rank).copied().unwrap_or_default()
        };
        Self { p50: rank(50), p99: rank(99), max: rank(100) }
    }
}

/// One point of a distribution's curve: so many of a hundred are not above it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentile {
    /// So many of a hundred.
    pub percent: f64,
    /// The value, in the unit of the field that holds it.
    pub value: f64,
}

/// Where a curve has its points.
const CURVE: [f64; 17] =
    [0.0, 1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

/// The curve of a distribution. Nearest rank; empty for none.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ranks: whole, positive and small")]
pub fn curve(mut values: Vec<f64>) -> Vec<Percentile> {
    values.sort_unstable_by(f64::total_cmp);
    let count = values.len() as f64;
    let at = |percent: f64| {
        let rank = ((count * percent / 100.0).ceil() as usize).saturating_sub(1);
        values.get(rank).map(|&value| Percentile { percent, value })
    };
    CURVE.into_iter().filter_map(at).collect()
}

/// One by the other; zero where there is nothing to divide by.
#[must_use]
pub fn ratio(one: f64, other: f64) -> f64 {
    if other == 0.0 { 0.0 } else { one / other }
}

/// The middle one, or the mean of both; zero for none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((spread.p50, spread.p99, spread.max), (100.0, 198.0, 200.0));
        assert_eq!((median(vec![3.0, 1.0, 2.0]), median(vec![1.0, 2.0]), median(Vec::new())), (2.0, 1.5, 0.0));
        let run = |p50: f64| Spread { p50, p99: 10.0 * p50, max: 100.0 * p50 };
        let runs = Spread::of_runs([run(1.0), run(5.0), run(2.0)].into_iter());
        assert_eq!((runs.p50, runs.p99, runs.max), (2.0, 20.0, 500.0));
        assert_eq!((runs.tail(), Spread::default().tail()), (10.0, 0.0));
        let one = Spread::of_us(std::iter::once(Duration::from_micros(7)));
        assert_eq!((one.p50.round(), one.p99.round(), one.max.round()), (7.0, 7.0, 7.0));
    }

    #[test]
    fn curves_go_from_the_least_to_the_largest() {
        let curve = curve((1..=1000).rev().map(f64::from).collect());
        let at = |wanted: f64| curve.iter().find(|point| point.percent == wanted).map(|point| point.value);
        assert_eq!([0.0, 50.0, 99.9, 100.0].map(at), [Some(1.0), Some(500.0), Some(999.0), Some(1000.0)]);
        assert!(super::curve(Vec::new()).is_empty());
    }
}
