//! What was measured lately.

/// Weight of the newest.
const NEWEST: f64 = 0.25;

/// Smaller sets say nothing about what a page takes: most of their time is that of beginning at all.
pub(super) const TELLING: usize = 64;

/// An average in which the newest counts a quarter.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lately(Option<f64>);

impl Lately {
    pub(super) fn note(&mut self, newest: f64) {
        self.0 = Some(self.0.map_or(newest, |before| before + (newest - before) * NEWEST));
    }

    pub(super) fn or(self, unknown: f64) -> f64 {
        self.0.unwrap_or(unknown)
    }
}

/// Counts of pages are far below what a double holds exactly.
pub(super) fn double(pages: usize) -> f64 {
    f64::from(u32::try_from(pages).unwrap_or(u32::MAX))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and below 2^32")]
pub(super) fn rounded(pages: f64) -> usize {
    pages.clamp(0.0, f64::from(u32::MAX)) as usize
}
