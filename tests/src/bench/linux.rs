//! `ftbench linux`: the load of `throughput` on a guest that somebody else wrote, Linux with a Redis server (`examples/linux-guest`). Where guest kernels are
//! emulated, as on nested hosts without VT-x or SVM, this guest is slow, and what protection adds weighs little; the figures say what users of such a host
//! would see, not what the demo guest's say about protection.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BenchError;
use super::table::{Findings, Table, Target};
use super::throughput::{self, Plan};
use crate::real::artifacts::{Artifacts, GuestImage};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.linux/1";

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub throughput: throughput::Report,
}

/// Measures all modes in turn, each on a guest that has just booted.
///
/// # Errors
/// There is no such guest in `image`, or the first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, image: &Path, progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    if !image.is_dir() {
        let how = "make it: examples/linux-guest/build";
        return Err(BenchError::Wrong(format!("no Linux guest in {0}; {how} {0}", image.display())));
    }
    let artifacts = Artifacts { guest: Some(GuestImage::open(image)?), ..artifacts.clone() };
    Ok(Report { schema: SCHEMA.into(), throughput: throughput::run(plan, &artifacts, progress)? })
}

impl Findings for Report {
    const NAME: &'static str = "linux";

    fn tables(&self) -> Vec<Table> {
        let mut tables = self.throughput.tables();
        tables.iter_mut().for_each(|table| table.title.insert_str(0, "Linux with a Redis server: "));
        tables
    }

    /// None: a guest that its host slows down meets any.
    fn targets(&self) -> Vec<Target> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_not_there_is_named_with_the_way_to_make_it() {
        let plan = Plan { modes: vec![], rounds: 1, loads: vec![], span: std::time::Duration::ZERO };
        let artifacts = Artifacts { bin: "/nonexistent".into(), guest: None };
        let error = run(&plan, &artifacts, Path::new("/no/guest"), |_| {}).unwrap_err().to_string();
        assert_eq!(error, "no Linux guest in /no/guest; make it: examples/linux-guest/build /no/guest");
    }
}
