//! Least squares with coefficients of at least 0: a step cannot take less time for more work.
//!
//! With three columns at most every choice of columns that may be above 0 can be tried: no iteration, no tolerance. Points
//! are weighted by one over what was measured, so that short ones count as much as long ones.

/// One measured point: its work by columns, and the time that it took.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) work: [f64; 3],
    pub(crate) ms: f64,
    /// For people.
    pub(crate) name: String,
}

/// Coefficients, and how well they fit.
#[derive(Clone, Debug)]
pub(crate) struct Fit {
    pub(crate) coefficients: [f64; 3],
    /// Share of the variance that is explained.
    pub(crate) r_squared: f64,
    /// The point that is furthest off in proportion, with what it should have taken.
    pub(crate) worst: Option<(Point, f64)>,
}

impl Fit {
    pub(crate) fn ms(&self, work: [f64; 3]) -> f64 {
        self.coefficients.iter().zip(work).map(|(coefficient, work)| coefficient * work).sum()
    }
}

/// Fits points; `None` if there are none.
pub(crate) fn fit(points: &[Point]) -> Option<Fit> {
    let error = |coefficients: &[f64; 3]| {
        let off = |point: &Point| {
            let fitted: f64 = coefficients.iter().zip(point.work).map(|(coefficient, work)| coefficient * work).sum();
            ((fitted - point.ms) / point.ms.max(1e-9)).powi(2)
        };
        points.iter().map(off).sum::<f64>()
    };
    if points.is_empty() {
        return None;
    }
    let candidates = (1..8u8).filter_map(|chosen| solve(points, chosen));
    let coefficients = candidates.min_by(|one, other| error(one).total_cmp(&error(other)))?;
    let bare = Fit { coefficients, r_squared: 1.0, worst: None };
    let mean = points.iter().map(|point| point.ms).sum::<f64>() / points.len() as f64;
    let variance: f64 = points.iter().map(|point| (point.ms - mean).powi(2)).sum();
    let rest: f64 = points.iter().map(|point| (point.ms - bare.ms(point.work)).powi(2)).sum();
    let off = |point: &&Point| (bare.ms(point.work) / point.ms.max(1e-9)).ln().abs();
    let worst = points.iter().max_by(|one, other| off(one).total_cmp(&off(other)));
    let worst = worst.map(|point| (point.clone(), bare.ms(point.work)));
    Some(Fit { r_squared: if variance > 0.0 { 1.0 - rest / variance } else { 1.0 }, worst, ..bare })
}

/// The least squares over the columns whose bit is set, the others 0; `None` if one would be negative, or cannot be told.
fn solve(points: &[Point], chosen: u8) -> Option<[f64; 3]> {
    let columns: Vec<usize> = (0..3).filter(|column| chosen >> column & 1 == 1).collect();
    let size = columns.len();
    // Columns differ by orders of magnitude: scaled to one, so that pivots can be compared.
    let weight = |point: &Point| 1.0 / point.ms.max(1e-9);
    let scale: Vec<f64> =
        columns.iter().map(|&c| points.iter().map(|p| (p.work[c] * weight(p)).abs()).fold(0.0, f64::max)).collect();
    if scale.contains(&0.0) {
        return None;
    }
    let mut rows = vec![vec![0.0; size + 1]; size];
    for point in points {
        let work: Vec<f64> = columns.iter().zip(&scale).map(|(&c, scale)| point.work[c] * weight(point) / scale).collect();
        for (i, row) in rows.iter_mut().enumerate() {
            for (j, cell) in row.iter_mut().take(size).enumerate() {
                *cell += work[i] * work[j];
            }
            row[size] += work[i];
        }
    }
    for at in 0..size {
        let pivot = (at..size).max_by(|&one, &other| rows[one][at].abs().total_cmp(&rows[other][at].abs()))?;
        rows.swap(at, pivot);
        if rows[at][at].abs() < 1e-9 {
            return None;
        }
        for below in 0..size {
            if below != at {
                let factor = rows[below][at] / rows[at][at];
                let pivot = rows[at].clone();
                rows[below].iter_mut().zip(&pivot).for_each(|(cell, pivot)| *cell -= factor * pivot);
            }
        }
    }
    let mut coefficients = [0.0; 3];
    for (i, (&column, scale)) in columns.iter().zip(&scale).enumerate() {
        coefficients[column] = rows[i][size] / rows[i][i] / scale;
    }
    coefficients.iter().all(|value| *value >= 0.0 && value.is_finite()).then_some(coefficients)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(of: impl Fn(f64) -> f64) -> Vec<Point> {
        let lengths = [32.0, 128.0, 512.0, 2048.0, 8192.0f64];
        lengths.iter().map(|&n| Point { work: [1.0, n, n * n], ms: of(n), name: n.to_string() }).collect()
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let fit = fit(&points(|n| 16.5 + 0.01518 * n + 4.21e-7 * n * n)).unwrap();
        for (found, real) in fit.coefficients.iter().zip([16.5, 0.01518, 4.21e-7]) {
            assert!((found / real - 1.0).abs() < 1e-3, "{fit:?}");
        }
        assert!(fit.r_squared > 0.999_999);
    }

    #[test]
    fn nothing_is_negative_and_the_worst_point_is_named() {
        let falling = fit(&points(|n| 100.0 - 0.001 * n)).unwrap();
        assert!(falling.coefficients.iter().all(|value| *value >= 0.0), "{falling:?}");
        let mut spoilt = points(|n| 5.0 + 0.02 * n);
        spoilt[2].ms *= 3.0;
        let fit = fit(&spoilt).unwrap();
        assert_eq!(fit.worst.unwrap().0.name, "512");
        assert!(fit.r_squared < 1.0);
    }

    #[test]
    fn too_few_points_make_a_simpler_law() {
        assert!(fit(&[]).is_none());
        let one = fit(&[Point { work: [1.0, 100.0, 10_000.0], ms: 7.0, name: String::new() }]).unwrap();
        assert!((one.ms([1.0, 100.0, 10_000.0]) - 7.0).abs() < 1e-6, "{one:?}");
    }
}
