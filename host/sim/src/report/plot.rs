//! Plots as inline SVG: lines over two axes, with a legend below. No scripts, no fonts, nothing from elsewhere.

use std::fmt::Write as _;

/// A line.
pub(super) struct Line<'a> {
    /// For the legend; lines without are drawn thin, as one of many.
    pub(super) name: Option<&'a str>,
    pub(super) points: Vec<(f64, f64)>,
    /// Number of its colour.
    pub(super) colour: usize,
    pub(super) is_dashed: bool,
}

/// What a plot is of.
pub(super) struct Plot<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Whether x grows by factors.
    pub(super) is_log: bool,
    pub(super) lines: Vec<Line<'a>>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 44.0;

/// Told apart by people who do not tell red from green (Okabe and Ito's palette, without yellow, which fades on white).
pub(super) const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777"];

/// Where values lie on an axis.
struct Axis {
    low: f64,
    high: f64,
    is_log: bool,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, is_log: bool) -> Self {
        let values = values.filter(move |value| value.is_finite() && (!is_log || *value > 0.0));
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        match (is_log, low.is_finite()) {
            (_, false) => Self { low: if is_log { 1.0 } else { 0.0 }, high: 10.0, is_log },
            (true, true) => Self { low: low / 1.1, high: high * 1.1, is_log },
            (false, true) => Self { low: 0.0, high: if high > 0.0 { high } else { 1.0 }, is_log },
        }
    }

    /// 0 at the low end, 1 at the high one.
    fn place(&self, value: f64) -> f64 {
        if self.is_log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// Round values: 1, 2 and 5 times the powers of ten on a logarithmic axis, about five even ones on the other.
    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let steps = if decades.clone().count() > 5 { &[1.0][..] } else { &[1.0, 2.0, 5.0] };
            let all = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
            return all.filter(|tick| (self.low..=self.high).contains(tick)).collect();
        }
        let rough = (self.high - self.low) / 5.0;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * unit).find(|&step| step >= rough).unwrap_or(rough);
        (0..).map(|nth| self.low + step * f64::from(nth)).take_while(|&tick| tick <= self.high * (1.0 + 1e-9)).collect()
    }
}

/// Text within HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Plot<'_> {
    pub(super) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| line.points.iter());
        let x = Axis::over(points().map(|point| point.0), self.is_log);
        let y = Axis::over(points().map(|point| point.1), false);
        let at_x = |value: f64| LEFT + x.place(value) * (WIDTH - LEFT - RIGHT);
        let at_y = |value: f64| HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM);
        let mut out = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#, escape(self.title));
        let _ = write!(out, r#"<text class="title" x="{LEFT}" y="16">{}</text>"#, escape(self.title));
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in x.ticks() {
            let (at, label) = (at_x(tick), number(tick));
            let _ = write!(out, r#"<path class="grid" d="M{at:.1} {TOP}V{bottom}"/>"#);
            let _ = write!(out, r#"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#, bottom + 16.0);
        }
        for tick in y.ticks() {
            let (at, label) = (at_y(tick), number(tick));
            let _ = write!(out, r#"<path class="grid" d="M{LEFT} {at:.1}H{right}"/>"#);
            let _ = write!(out, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#, LEFT - 6.0, at + 4.0);
        }
        let _ = write!(out, r#"<text x="{right}" y="{:.1}" text-anchor="end">{}</text>"#, HEIGHT - 8.0, escape(self.x));
        let _ = write!(out, r#"<text x="{right}" y="16" text-anchor="end">{}</text>"#, escape(self.y));
        for line in &self.lines {
            let mut path = String::new();
            for &(px, py) in &line.points {
                let _ = write!(path, "{}{:.1} {:.1}", if path.is_empty() { 'M' } else { 'L' }, at_x(px), at_y(py));
            }
            let colour = COLOURS[line.colour % COLOURS.len()];
            let width = if line.name.is_some() { 2.0 } else { 0.8 };
            let dashes = if line.is_dashed { r#" stroke-dasharray="6 4""# } else { "" };
            let _ = write!(out, r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>"#);
        }
        out.push_str("</svg>");
        out + &self.legend()
    }

    fn legend(&self) -> String {
        let entry = |line: &Line<'_>| {
            let colour = COLOURS[line.colour % COLOURS.len()];
            let style = if line.is_dashed { "dashed" } else { "solid" };
            let name = line.name.map(escape)?;
            Some(format!(r#"<span><i style="border-top:3px {style} {colour}"></i>{name}</span>"#))
        };
        format!(r#"<p class="legend">{}</p>"#, self.lines.iter().filter_map(entry).collect::<String>())
    }
}

/// As short as it can be said.
fn number(value: f64) -> String {
    let text = if value.abs() >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.3}") };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        assert_eq!(Axis { low: 0.0, high: 7.0, is_log: false }.ticks(), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(Axis { low: 30.0, high: 600.0, is_log: true }.ticks(), [50.0, 100.0, 200.0, 500.0]);
    }

    #[test]
    fn a_plot_of_nothing_is_a_plot() {
        let plot = Plot { title: "a < b", x: "x", y: "y", is_log: true, lines: Vec::new() };
        assert!(plot.svg().contains("a &lt; b"));
    }
}
