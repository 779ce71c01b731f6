//! Distributions of what was measured.

use std::time::Duration;

use serde::Serialize;

/// A distribution, in the unit of the field that holds it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((spread.p50, spread.p99, spread.max), (100.0, 198.0, 200.0));
        let one = Spread::of_us(std::iter::once(Duration::from_micros(7)));
        assert_eq!((one.p50.round(), one.p99.round(), one.max.round()), (7.0, 7.0, 7.0));
    }
}
