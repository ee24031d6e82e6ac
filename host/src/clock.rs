//! Time as decisions see it: milliseconds, taken once per decision and handed on; and as people write it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use toml::value::{Datetime, Offset};

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Milliseconds since the host started.
    pub(crate) fn now_ms(self) -> u64 {
        self.at_ms(Instant::now())
    }

    /// A moment on this clock.
    pub(crate) fn at_ms(self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.start).as_millis() as u64
    }
}

/// Milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms() -> u64 {
    since_1970(SystemTime::now())
}

/// A clock that was set to before 1970 is taken for one that stands there.
fn since_1970(moment: SystemTime) -> u64 {
    moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Milliseconds since 1970 of a date (its beginning, in UTC), or of a date with time and offset; `None` for anything else.
pub(crate) fn unix_ms_of(moment: Datetime) -> Option<u64> {
    let date = moment.date?;
    let seconds = match (moment.time, moment.offset) {
        (None, None) => 0,
        (Some(time), Some(offset)) => {
            let minutes = match offset {
                Offset::Z => 0,
                Offset::Custom { minutes } => i64::from(minutes),
            };
            let in_day = i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + i64::from(time.second.unwrap_or(0));
            in_day - minutes * 60
        }
        _ => return None,
    };
    let days = days_since_1970(i64::from(date.year), i64::from(date.month), i64::from(date.day));
    Some(u64::try_from((days * 86_400 + seconds) * 1000).unwrap_or(0))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar: years that begin in March have their leap day last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - 719_468
}

/// A moment in UTC, to the millisecond, as RFC 3339 has it.
pub(crate) fn utc(unix_ms: u64) -> String {
    let (days, ms) = ((unix_ms / 86_400_000) as i64, unix_ms % 86_400_000);
    // The year that begins in March before or on that day; a guess that is a year too great at most.
    let mut year = 1970 + (days + 1) / 365;
    while days_since_1970(year, 3, 1) > days {
        year -= 1;
    }
    let day_of_year = days - days_since_1970(year, 3, 1);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_clock_is_monotonic_and_knows_no_date() {
        let clock = Clock::start();
        let start = clock.start;
        let moments = [0, 1, 999, 86_400_000];
        assert_eq!(moments.map(|ms| clock.at_ms(start + std::time::Duration::from_millis(ms))), moments);
        // What was before it began is its beginning, not a number that wraps.
        assert_eq!(clock.at_ms(start.checked_sub(std::time::Duration::from_millis(5)).unwrap_or(start)), 0);
    }

    #[test]
    fn a_wall_clock_before_1970_is_1970() {
        assert_eq!(since_1970(UNIX_EPOCH - std::time::Duration::from_secs(1)), 0);
        assert_eq!(since_1970(UNIX_EPOCH + std::time::Duration::from_millis(1_709_164_800_000)), 1_709_164_800_000);
    }

    #[test]
    fn a_day_is_written_as_it_is_read() {
        for day in (0..60_000).step_by(17).chain(11_010..11_020) {
            let text = utc(day * 86_400_000 + 3_723_004);
            assert!(text.ends_with("T01:02:03.004Z"), "{text}");
            assert_eq!(unix_ms_of(text.parse().unwrap()), Some(day * 86_400_000 + 3_723_000), "{text}");
        }
        assert_eq!(utc(1_709_164_800_000), "2024-02-29T00:00:00.000Z");
    }

    #[test]
    fn moments_are_counted_from_1970() {
        let ms = |text: &str| unix_ms_of(text.parse().unwrap());
        assert_eq!(ms("1970-01-02").unwrap(), 86_400_000);
        assert_eq!(ms("2024-02-29T12:00:00+02:00").unwrap(), 1_709_200_800_000);
        assert_eq!(ms("2024-12-31T23:59:59Z").unwrap(), 1_735_689_599_000);
        assert_eq!(ms("2024-12-31T23:59:59"), None, "it does not say where");
    }
}
