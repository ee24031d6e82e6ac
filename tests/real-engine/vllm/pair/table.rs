//! What came of a scene, and all of it as a table.

use std::time::Duration;

/// A scene. All of its requests were answered, and rightly: else there would be no table.
pub(super) struct Row {
    scene: &'static str,
    took: Vec<Duration>,
    pub(super) handed_over: usize,
    /// Prompt tokens that the engine which decodes computed, and fetched, by its own count.
    pub(super) computed: Option<u64>,
    pub(super) fetched: Option<u64>,
    /// How long one engine alone took for the same.
    pub(super) alone: Vec<Duration>,
    /// From an engine's first sign of life to the first request that was handed over.
    pub(super) back: Option<Duration>,
}

impl Row {
    pub(super) fn new(scene: &'static str) -> Self {
        Self { scene, took: Vec::new(), handed_over: 0, computed: None, fetched: None, alone: Vec::new(), back: None }
    }

    pub(super) fn served(&mut self, is_handed_over: bool, took: Duration) {
        self.took.push(took);
        self.handed_over += usize::from(is_handed_over);
    }
}

pub(super) fn print(rows: &[Row]) {
    println!("\nevery request of these scenes was answered, with the text and the usage of one engine alone; times in seconds");
    println!(
        "{:<40} {:>8} {:>11} {:>8} {:>8} {:>8} {:>9} {:>8} {:>6}",
        "", "answered", "handed over", "median", "slowest", "alone", "computed", "fetched", "back"
    );
    for row in rows {
        println!(
            "{:<40} {:>8} {:>11} {:>8} {:>8} {:>8} {:>9} {:>8} {:>6}",
            row.scene,
            row.took.len(),
            row.handed_over,
            seconds(median(&row.took)),
            seconds(row.took.iter().max().copied()),
            seconds(median(&row.alone)),
            said(row.computed),
            said(row.fetched),
            seconds(row.back),
        );
    }
    println!("computed, fetched: prompt tokens, by the decode engine's own metrics; back: from its first sign of life\n");
}

fn median(times: &[Duration]) -> Option<Duration> {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "–".to_owned(), |time| format!("{:.2}", time.as_secs_f64()))
}

fn said(count: Option<u64>) -> String {
    count.map_or_else(|| "–".to_owned(), |count| count.to_string())
}
