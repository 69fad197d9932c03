//! Ranks drawn from a bounded Zipf distribution: rank `k` of `1..=n` with a probability in proportion to `k^-s`.
//!
//! Rejection-inversion: W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates from monotone
//! discrete distributions", ACM Transactions on Modeling and Computer Simulation 6(3), 1996, pages 169-184. No
//! table, constant expected time (less than 1.1 draws a rank), exact for every exponent and bound. The function names are
//! the paper's; the forms by `exp_m1` and `ln_1p`, which stay exact near `s = 1`, are those of Apache Commons RNG.

use fastrand::Rng;

/// A bounded Zipf distribution.
#[derive(Debug, Clone)]
pub struct Zipf {
    n: f64,
    exponent: f64,
    /// `H(3/2) - h(1)`, where the inverted range begins.
    h_first: f64,
    /// `H(n + 1/2)`, where it ends.
    h_last: f64,
    /// Distance within which a candidate is taken without evaluating `H`.
    squeeze: f64,
}

impl Zipf {
    /// Ranks `1..=n` with the exponent `exponent >= 0`; 0 is uniform.
    pub fn new(n: u32, exponent: f64) -> Self {
        debug_assert!(n >= 1 && exponent >= 0.0);
        let n = f64::from(n);
        Self {
            n,
            exponent,
            h_first: h_integral(1.5, exponent) - 1.0,
            h_last: h_integral(n + 0.5, exponent),
            squeeze: 2.0
                - h_integral_inverse(h_integral(2.5, exponent) - h(2.0, exponent), exponent),
        }
    }

    /// Draws a rank.
    pub fn sample(&self, rng: &mut Rng) -> u32 {
        loop {
            let u = self.h_last + rng.f64() * (self.h_first - self.h_last);
            let x = h_integral_inverse(u, self.exponent);
            // Rounding errors can carry `x` a little beyond either end.
            let k = (x + 0.5).floor().clamp(1.0, self.n);
            if k - x <= self.squeeze
                || u >= h_integral(k + 0.5, self.exponent) - h(k, self.exponent)
            {
                return k as u32;
            }
        }
    }
}

/// The hat, `x^-s`.
fn h(x: f64, exponent: f64) -> f64 {
    (-exponent * x.ln()).exp()
}

/// The integral of the hat, `(x^(1-s) - 1) / (1-s)`, and `ln x` at `s = 1`.
fn h_integral(x: f64, exponent: f64) -> f64 {
    let log_x = x.ln();
    exp_m1_over_x((1.0 - exponent) * log_x) * log_x
}

fn h_integral_inverse(y: f64, exponent: f64) -> f64 {
    // Below -1 only by rounding.
    let t = (y * (1.0 - exponent)).max(-1.0);
    (ln_1p_over_x(t) * y).exp()
}

/// `(e^x - 1) / x`, by its series near 0.
fn exp_m1_over_x(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.exp_m1() / x
    } else {
        1.0 + x / 2.0 * (1.0 + x / 3.0)
    }
}

/// `ln(1 + x) / x`, by its series near 0.
fn ln_1p_over_x(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.ln_1p() / x
    } else {
        1.0 - x * (0.5 - x / 3.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_their_exact_probabilities() {
        const DRAWS: u32 = 400_000;
        for exponent in [0.0, 0.5, 0.99, 1.0, 1.000_000_001, 1.5, 3.0, 10.0] {
            for n in [1_u32, 2, 3, 50] {
                let zipf = Zipf::new(n, exponent);
                let mut rng = Rng::with_seed(7);
                let mut counts = vec![0_u32; n as usize];
                for _ in 0..DRAWS {
                    counts[zipf.sample(&mut rng) as usize - 1] += 1;
                }
                let weights: Vec<f64> = (1..=n).map(|k| f64::from(k).powf(-exponent)).collect();
                let total: f64 = weights.iter().sum();
                for (rank, (count, weight)) in (1..).zip(counts.iter().zip(&weights)) {
                    let expected = weight / total * f64::from(DRAWS);
                    // Five standard deviations, and room for the rarest ranks, where one draw is many of them.
                    let tolerance = 5.0 * expected.sqrt() + 2.0;
                    assert!(
                        (f64::from(*count) - expected).abs() <= tolerance,
                        "rank {rank} of {n}, exponent {exponent}: {count} draws, {expected:.1} expected"
                    );
                }
            }
        }
    }

    #[test]
    fn the_largest_rank_can_be_drawn_and_none_beyond_it() {
        let zipf = Zipf::new(3, 0.2);
        let mut rng = Rng::with_seed(1);
        let largest = (0..1000).map(|_| zipf.sample(&mut rng)).max();
        assert_eq!(largest, Some(3));
    }
}
