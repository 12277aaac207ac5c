//! Spherical interpolation between two updates ("Animating rotation with quaternion curves", SIGGRAPH 1985; conventions of `mergekit`).

use lowrank_optim::registry::{Entry, Kind, OptionError, OptionList, Paper};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::algebra::{inner_product, stacked};
use super::definition::{Composed, Composition, CompositionEntry, read};
use super::error::ComposeError;
use super::source::Layer;

/// `(sin((1 - t) theta) D_a + sin(t theta) D_b) / sin theta` with the angle theta between the updates of a layer. The result is a concatenation
/// of both adapters.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Slerp {
    /// Position between the first adapter (0) and the second (1).
    #[schemars(range(min = 0.0, max = 1.0), extend("x-unset" = "share of the second weight in the sum of both"))]
    pub t: Option<f64>,
}

/// Cosine above which two updates count as parallel and are interpolated linearly.
const PARALLEL: f64 = 0.9995;

pub(super) static ENTRY: CompositionEntry = CompositionEntry {
    entry: Entry {
        papers: &[Paper { title: "Animating rotation with quaternion curves", place: "SIGGRAPH 1985" }],
        memory: "(r_a + r_b) (d_in + d_out)",
        options: || OptionList::of(&Slerp::default()),
        ..Entry::plain(Kind::Composition, "slerp", "interpolation between two adapters along the arc")
    },
    makes_pool: false,
    read: |options| read::<Slerp>(&ENTRY, options),
};

impl Slerp {
    /// Position between the ends.
    fn position(&self, layer: &Layer) -> Result<f64, ComposeError> {
        let [first, second] = [&layer.sources[0], &layer.sources[1]];
        if let Some(t) = self.t {
            return match (first.weight, second.weight) {
                (None, None) => Ok(t),
                _ => Err(OptionError::value(
                    "t",
                    t,
                    "the weights of the adapters state the position too; give one of the two",
                )
                .into()),
            };
        }
        let (sum, t) = (first.weight() + second.weight(), second.weight() / (first.weight() + second.weight()));
        if sum == 0.0 || !(0.0..=1.0).contains(&t) {
            return Err(ComposeError::Sources(format!(
                "the weights {} of {} and {} of {} give no position between both: slerp needs weights of at least 0 whose sum is above 0, or t",
                first.weight(),
                first.adapter,
                second.weight(),
                second.adapter
            )));
        }
        Ok(t)
    }
}

impl Composition for Slerp {
    fn check(&self, sources: &[String]) -> Result<(), ComposeError> {
        match sources.len() {
            2 => Ok(()),
            count => Err(ComposeError::Sources(format!(
                "slerp interpolates between two adapters, {count} are given ({}); give two",
                sources.join(", ")
            ))),
        }
    }

    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError> {
        let names: Vec<String> = layer.sources.iter().map(|source| source.adapter.clone()).collect();
        self.check(&names)?;
        let t = self.position(layer)?;
        let [x, y] = [&layer.sources[0], &layer.sources[1]];
        let product = |x: [&_; 2], y: [&_; 2]| inner_product(x, y);
        let (of_x, of_y) = ([&x.b, &x.a], [&y.b, &y.a]);
        let norms = [product(of_x, of_x).sqrt() * x.scale.abs(), product(of_y, of_y).sqrt() * y.scale.abs()];
        let cosine = match norms[0] * norms[1] {
            0.0 => 1.0,
            norms => (x.scale * y.scale * product(of_x, of_y) / norms).clamp(-1.0, 1.0),
        };
        let shares = if cosine.abs() > PARALLEL {
            [1.0 - t, t]
        } else {
            let theta = cosine.acos();
            [((1.0 - t) * theta).sin() / theta.sin(), (t * theta).sin() / theta.sin()]
        };
        let (a, b) = stacked(&[(&x.a, &x.b, shares[0] * x.scale), (&y.a, &y.b, shares[1] * y.scale)]);
        Ok(Composed::factors(a, b).with("cosine", cosine).with("t", t))
    }
}
