//! Results in their three forms: tables for people, Markdown for docs, one JSON object for programs.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Lines with a name and some figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// What the figures are, their unit included.
    pub title: String,
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table; the first head is over the names.
    #[must_use]
    pub fn new(title: impl Into<String>, heads: &[&str]) -> Self {
        let heads = heads.iter().map(|&head| head.to_owned()).collect();
        Self { title: title.into(), heads, rows: Vec::new() }
    }

    /// Adds a line.
    ///
    /// # Panics
    /// If it has another number of cells than the table has heads.
    pub fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.heads.len(), "a cell for each head of {:?}", self.heads);
        self.rows.push(cells);
    }

    /// For a terminal: names to the left, figures to the right.
    #[must_use]
    pub fn text(&self) -> String {
        let lines = || std::iter::once(&self.heads).chain(&self.rows);
        let width = |column: usize| lines().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.heads.len()).map(width).collect();
        let mut out = format!("{}\n\n", self.title);
        for row in lines() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let padded = if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
                line.push_str(&padded);
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    /// For a page.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = format!("{}\n\n", self.title);
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        out.push_str(&line(&self.heads));
        let marks = (0..self.heads.len()).map(|column| if column == 0 { "---".into() } else { "---:".to_owned() });
        out.push_str(&line(&marks.collect::<Vec<_>>()));
        self.rows.iter().for_each(|row| out.push_str(&line(row)));
        out
    }
}

/// Which side of its limit a figure is wanted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Not above it.
    AtMost,
    /// Not below it.
    AtLeast,
}

/// What was asked for, and what was measured. A target that is missed is reported, never an error: the host may be busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The figure, its unit included.
    pub what: String,
    /// As measured.
    pub figure: f64,
    /// Which side of the limit is wanted.
    pub bound: Bound,
    /// The limit.
    pub limit: f64,
    /// Whether the figure is on that side.
    pub met: bool,
}

impl Target {
    /// A figure that is not to be above `limit`.
    #[must_use]
    pub fn at_most(what: impl Into<String>, figure: f64, limit: f64) -> Self {
        Self { what: what.into(), figure, bound: Bound::AtMost, limit, met: figure <= limit }
    }

    /// A figure that is not to be below `limit`.
    #[must_use]
    pub fn at_least(what: impl Into<String>, figure: f64, limit: f64) -> Self {
        Self { what: what.into(), figure, bound: Bound::AtLeast, limit, met: figure >= limit }
    }
}

/// All targets of a result as a table; none when it has none.
#[must_use]
pub fn of_targets(targets: &[Target]) -> Option<Table> {
    let mut table = Table::new("targets", &["figure", "measured", "wanted", ""]);
    for Target { what, figure, bound, limit, met } in targets {
        let sign = if *bound == Bound::AtMost { "<=" } else { ">=" };
        let verdict = if *met { "met" } else { "NOT MET" };
        table.row(vec![what.clone(), short(*figure), format!("{sign} {}", short(*limit)), verdict.into()]);
    }
    (!targets.is_empty()).then_some(table)
}

/// A figure with about three digits that say something.
#[must_use]
pub fn short(figure: f64) -> String {
    let digits = match figure.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 0.1 || size == 0.0 => 2,
        _ => 4,
    };
    format!("{figure:.digits$}")
}

/// What a subcommand found.
pub trait Findings: Serialize {
    /// The subcommand, which is also the name of the file in a directory of results.
    const NAME: &'static str;

    /// The figures.
    fn tables(&self) -> Vec<Table>;

    /// What was asked for, beside it.
    fn targets(&self) -> Vec<Target> {
        Vec::new()
    }

    /// Everything for a terminal.
    ///
    /// # Panics
    /// Never: a string can be written to.
    fn text(&self) -> String {
        let mut out = String::new();
        for table in self.tables().into_iter().chain(of_targets(&self.targets())) {
            writeln!(out, "{}", table.text()).expect("a string");
        }
        out
    }

    /// Everything for a page.
    ///
    /// # Panics
    /// Never: a string can be written to.
    fn markdown(&self) -> String {
        let mut out = String::new();
        for table in self.tables().into_iter().chain(of_targets(&self.targets())) {
            writeln!(out, "{}", table.markdown()).expect("a string");
        }
        out
    }

    /// The JSON form: the result with its targets.
    ///
    /// # Errors
    /// None: the figures of a result are plain values.
    fn document(&self) -> serde_json::Result<Value> {
        let mut document = serde_json::to_value(self)?;
        document["targets"] = serde_json::to_value(self.targets())?;
        Ok(document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_marked() {
        let mut table = Table::new("times, us", &["", "p50"]);
        table.row(vec!["stop".into(), "7".into()]);
        table.row(vec!["whole".into(), "1234".into()]);
        assert_eq!(table.text(), "times, us\n\n        p50\nstop      7\nwhole  1234\n");
        let page = "times, us\n\n|  | p50 |\n| --- | ---: |\n| stop | 7 |\n| whole | 1234 |\n";
        assert_eq!(table.markdown(), page);
    }

    #[test]
    fn targets_are_met_on_their_side_of_the_limit() {
        assert!(Target::at_most("a", 1.0, 1.0).met && !Target::at_most("a", 1.1, 1.0).met);
        assert!(Target::at_least("a", 1.0, 1.0).met && !Target::at_least("a", 0.9, 1.0).met);
        let table = of_targets(&[Target::at_most("ratio", 1.5, 1.3)]).expect("one").text();
        assert!(table.contains("ratio") && table.contains("<= 1.30") && table.contains("NOT MET"), "{table}");
        assert_eq!(of_targets(&[]), None);
    }

    #[test]
    fn figures_are_short() {
        let all = [1234.5, 99.94, 1.234, 0.0, 0.0173, -12.34].map(short);
        assert_eq!(all, ["1234", "99.9", "1.23", "0.00", "0.0173", "-12.3"]);
    }
}
