//! Charts of lines as PNG files. The font is compiled in: a chart looks the same on every host.

use std::io::BufWriter;
use std::path::Path;
use std::sync::Once;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;

use super::table::short;
use super::{BenchError, host};

/// Pixels of a chart.
const SIZE: (u32, u32) = (1200, 620);
/// Pixels of its left part; the names of the lines are in the rest.
const PLOT: u32 = 930;
const FONT: &str = "sans-serif";
/// The palette of Okabe and Ito, which everybody can tell apart.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
    RGBColor(150, 150, 150),
];

/// An axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    /// What it shows, its unit included.
    pub(super) name: &'static str,
    /// Whether each step multiplies.
    pub(super) log: bool,
}

/// One line.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    /// From the left to the right.
    pub(super) points: Vec<(f64, f64)>,
    /// Something to compare with, not a result of ours.
    pub(super) dashed: bool,
    /// Which of the colours, counted around.
    pub(super) colour: usize,
}

/// All of it.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
}

impl Chart {
    /// Draws it into a file. False, and no file, when there is nothing to draw.
    pub(super) fn write(&self, path: &Path) -> Result<bool, BenchError> {
        let shown = |value: f64, axis: Axis| value.is_finite() && (!axis.log || value > 0.0);
        let mut chart = self.clone();
        for series in &mut chart.series {
            series.points.retain(|(x, y)| shown(*x, self.x) && shown(*y, self.y));
        }
        chart.series.retain(|series| !series.points.is_empty());
        if chart.series.is_empty() {
            return Ok(false);
        }
        let mut pixels = vec![0; SIZE.0 as usize * SIZE.1 as usize * 3];
        chart.draw(&mut pixels).map_err(|error| BenchError::Wrong(format!("{}: {error}", path.display())))?;
        write_png(path, &pixels).map_err(host("a chart's file"))?;
        Ok(true)
    }

    fn draw(&self, pixels: &mut [u8]) -> Result<(), String> {
        static FONTS: Once = Once::new();
        FONTS.call_once(|| {
            if register_font(FONT, FontStyle::Normal, UBUNTU_LIGHT).is_err() {
                log::error!("the font that is compiled in cannot be read");
            }
        });
        let (x, y) = (self.range(|(x, _)| x, self.x.log), self.range(|(_, y)| y, self.y.log));
        // With fewer only powers of ten are labelled, which a short axis may have none of.
        let labels = |axis: Axis, range: &std::ops::Range<f64>| match axis.log {
            true if range.end / range.start < 16.0 => 11,
            _ => 8,
        };
        let labels = (labels(self.x, &x), labels(self.y, &y));
        match (self.x.log, self.y.log) {
            (false, false) => self.on(pixels, x, y, labels),
            (true, false) => self.on(pixels, x.log_scale(), y, labels),
            (false, true) => self.on(pixels, x, y.log_scale(), labels),
            (true, true) => self.on(pixels, x.log_scale(), y.log_scale(), labels),
        }
    }

    /// What an axis spans: all values with some room, and zero unless each step multiplies.
    fn range(&self, of: fn((f64, f64)) -> f64, log: bool) -> std::ops::Range<f64> {
        let values = || self.series.iter().flat_map(|series| &series.points).map(|point| of(*point));
        let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        if log { least / 1.25..most * 1.25 } else { least.min(0.0)..(most * 1.05).max(least.min(0.0) + 1e-9) }
    }

    fn on<X, Y>(&self, pixels: &mut [u8], x: X, y: Y, labels: (usize, usize)) -> Result<(), String>
    where
        X: AsRangedCoord<Value = f64>,
        Y: AsRangedCoord<Value = f64>,
        X::CoordDescType: ValueFormatter<f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let area = BitMapBackend::with_buffer(pixels, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| text(&e))?;
        let (plot, names) = area.split_horizontally(PLOT);
        let mut context = ChartBuilder::on(&plot)
            .caption(&self.title, (FONT, 24))
            .margin(16)
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(x, y)
            .map_err(|e| text(&e))?;
        context
            .configure_mesh()
            .x_desc(self.x.name)
            .y_desc(self.y.name)
            .x_labels(labels.0)
            .y_labels(labels.1)
            .max_light_lines(1)
            .axis_desc_style((FONT, 19))
            .label_style((FONT, 16))
            .light_line_style(RGBColor(243, 243, 243))
            .bold_line_style(RGBColor(218, 218, 218))
            .x_label_formatter(&|value| label(*value))
            .y_label_formatter(&|value| label(*value))
            .draw()
            .map_err(|e| text(&e))?;
        for (series, at) in self.series.iter().zip((0..).map(|line| 64 + 26 * line)) {
            let colour = COLOURS[series.colour % COLOURS.len()];
            let (points, style) = (series.points.iter().copied(), colour.stroke_width(2));
            let sample = PathElement::new(vec![(4, at), (if series.dashed { 12 } else { 28 }, at)], style);
            names.draw(&sample).map_err(|e| text(&e))?;
            names.draw(&Text::new(series.name.clone(), (36, at - 9), (FONT, 17))).map_err(|e| text(&e))?;
            if series.dashed {
                let second = PathElement::new(vec![(19, at), (27, at)], style);
                names.draw(&second).map_err(|e| text(&e))?;
                context.draw_series(DashedLineSeries::new(points, 7, 5, style)).map_err(|e| text(&e))?;
            } else {
                context.draw_series(LineSeries::new(points, style)).map_err(|e| text(&e))?;
                let marks = series.points.iter().map(|point| Circle::new(*point, 4, colour.filled()));
                context.draw_series(marks).map_err(|e| text(&e))?;
            }
        }
        area.present().map_err(|e| text(&e))
    }
}

/// A number beside an axis: no digits that say nothing.
fn label(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { short(value) }
}

fn write_png(path: &Path, pixels: &[u8]) -> std::io::Result<()> {
    let file = std::fs::File::create(path)?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    Ok(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(log: bool, points: &[(f64, f64)]) -> Chart {
        let axis = |name| Axis { name, log };
        let one = |dashed| Series { name: "one".into(), points: points.to_vec(), dashed, colour: usize::from(dashed) };
        let series = [false, true].map(one);
        Chart { title: "a chart".into(), x: axis("x"), y: axis("y"), series: series.into() }
    }

    #[test]
    fn charts_are_drawn_with_their_lines() {
        let dir = tempfile::tempdir().unwrap();
        for log in [false, true] {
            let path = dir.path().join(format!("{log}.png"));
            assert!(chart(log, &[(1.0, 10.0), (10.0, 1000.0)]).write(&path).unwrap());
            let mut reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
            reader.set_transformations(png::Transformations::IDENTITY);
            let mut reader = reader.read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            let is = |colour: RGBColor| move |pixel: &&[u8; 3]| **pixel == [colour.0, colour.1, colour.2];
            let count = |colour| pixels.as_chunks::<3>().0.iter().filter(is(colour)).count();
            // A line, dashes in the next colour, and text: black pixels are of letters only.
            assert!(count(COLOURS[0]) > 500 && count(COLOURS[1]) > 200, "{log}");
            assert!(count(BLACK) > 100, "{log}: no text");
        }
    }

    #[test]
    fn what_cannot_be_shown_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.png");
        assert!(!chart(true, &[(0.0, 1.0), (1.0, f64::NAN)]).write(&path).unwrap());
        assert!(!path.exists());
        assert!(chart(false, &[(0.0, 0.0)]).write(&path).unwrap());
    }
}
