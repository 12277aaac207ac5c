//! Matching of a configuration to the layers of a model: the layers it adapts, with their ranks and scales.

use crate::ground::config::{AdapterConfig, Scaling};
use crate::ground::entry::StructureEntry;
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::layers::LinearLayer;
use crate::ground::site::Place;
use crate::ground::spec::{Alpha, Rank};
use crate::ground::targets::{NamePattern, Targets};

impl AdapterConfig {
    /// Registry entry of the structure.
    pub fn entry(&self) -> Result<&'static StructureEntry, AdapterError> {
        StructureEntry::find(&self.structure)
    }

    /// Registry entry of the initialisation; none for the structure's own default.
    pub fn initialisation(&self) -> Option<&'static Initialisation> {
        self.entry().ok()?.spec.init(&self.init)
    }

    /// Gives the first learning rate of the run to an initialisation that takes the first step, where no step size is
    /// given.
    pub fn with_first_rate(self, rate: f64) -> Self {
        match self.initialisation().and_then(|init| init.first_rate) {
            Some(option) if !self.options.contains_key(option) => self.with_option(option, rate),
            _ => self,
        }
    }

    /// Rejects settings that are invalid for every layer.
    pub fn validate(&self) -> Result<(), AdapterError> {
        let spec = self.entry()?.spec;
        let refuse = |key: &str, value: String, reason: &str| {
            Err(AdapterError::Setting {
                key: format!("adapter.{key}"),
                value,
                reason: format!("{} {reason}", spec.name),
            })
        };
        let ranks = self.rank.iter().chain(self.rank_pattern.iter().map(|(_, rank)| rank));
        for rank in ranks {
            if spec.rank == Rank::None {
                return refuse("rank", rank.to_string(), "has no rank; take it away");
            }
            if *rank == 0 {
                return refuse("rank", rank.to_string(), "needs a rank of at least 1");
            }
        }
        for alpha in self.alpha.iter().chain(self.alpha_pattern.iter().map(|(_, alpha)| alpha)) {
            if spec.alpha == Alpha::None {
                return refuse("alpha", alpha.to_string(), "has no alpha; take it away");
            }
            if !alpha.is_finite() || *alpha <= 0.0 {
                return refuse("alpha", alpha.to_string(), "needs an alpha above 0");
            }
        }
        if let (Alpha::None, Some(scaling)) = (spec.alpha, self.scaling) {
            return refuse("scaling", format!("{scaling:?}"), "has no scale; take it away");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse("dropout", self.dropout.to_string(), "needs a dropout from 0 to below 1");
        }
        if self.dropout > 0.0 && !spec.dropout {
            return refuse("dropout", self.dropout.to_string(), "has no dropout; take it away");
        }
        if self.init != "default" && spec.init(&self.init).is_none() {
            let names: Vec<&str> = std::iter::once("default").chain(spec.inits.iter().map(|init| init.name)).collect();
            let known = format!("knows {}", names.join(", "));
            return refuse("init", self.init.clone(), &known);
        }
        Ok(())
    }

    /// Returns the matching layers, each checked.
    pub fn places(&self, found: &[LinearLayer]) -> Result<Vec<Place>, AdapterError> {
        self.validate()?;
        let chosen = self.chosen(found)?;
        let largest =
            chosen.iter().fold([0, 0], |[d_in, d_out], layer| [d_in.max(layer.shape[0]), d_out.max(layer.shape[1])]);
        let rank_of = Pattern::all(&self.rank_pattern)?;
        let alpha_of = Pattern::all(&self.alpha_pattern)?;
        for pattern in rank_of.iter().map(|p| &p.name).chain(alpha_of.iter().map(|p| &p.name)) {
            if !chosen.iter().any(|layer| pattern.matches(&layer.path)) {
                return Err(AdapterError::NoMatch {
                    what: format!("the pattern {}", pattern.text),
                    known: names(chosen.iter().copied()),
                });
            }
        }
        let entry = self.entry()?;
        let (usual_rank, usual_alpha) = entry.size(&self.options)?;
        let mut places = Vec::with_capacity(chosen.len());
        for layer in &chosen {
            let rank = first(&rank_of, &layer.path).or(self.rank);
            let rank = match (rank, usual_rank) {
                (Some(rank), _) => rank,
                (None, Rank::Fixed(rank)) => rank,
                (None, Rank::SmallerSide(most)) => layer.shape[0].min(layer.shape[1]).min(most),
                (None, Rank::None) => 0,
            };
            let alpha = first(&alpha_of, &layer.path).or(self.alpha);
            let alpha = match (alpha, usual_alpha) {
                (Some(alpha), _) | (None, Alpha::Fixed(alpha)) => alpha,
                (None, Alpha::Ranks(times)) => times * rank as f64,
                (None, Alpha::None) => 0.0,
            };
            let divisor = match self.scaling.unwrap_or(entry.spec.scaling) {
                Scaling::Rank => rank.max(1) as f64,
                Scaling::RootRank => (rank.max(1) as f64).sqrt(),
            };
            let scale = if entry.spec.alpha == Alpha::None { 1.0 } else { alpha / divisor };
            let place = Place {
                path: layer.path.clone(),
                shape: layer.shape,
                rank,
                alpha,
                scale,
                dropout: self.dropout,
                init: self.init.clone(),
                layers: chosen.len(),
                largest,
                bias: layer.bias,
                embedding: layer.embedding,
            };
            entry.check(&self.options, &place)?;
            places.push(place);
        }
        Ok(places)
    }

    /// Targets that match no layer although others do.
    pub(super) fn idle(&self, found: &[LinearLayer]) -> Result<Vec<String>, AdapterError> {
        let mut idle = Vec::new();
        let any = |targets: &Targets| -> Result<bool, AdapterError> {
            let matcher = targets.matcher()?;
            Ok(found.iter().any(|layer| matcher.matches(&layer.path)))
        };
        for (key, targets) in [("targets", Some(&self.targets)), ("exclude", self.exclude.as_ref())] {
            for part in targets.into_iter().flat_map(Targets::parts) {
                if !any(&part)? {
                    idle.push(format!("adapter.{key}: no linear layer matches {part}"));
                }
            }
        }
        for part in self.layers.iter().flat_map(|_| self.targets.parts()) {
            let matcher = part.matcher()?;
            let within = |layer: &&LinearLayer| self.is_within(&layer.path);
            let mut matching = found.iter().filter(|layer| matcher.matches(&layer.path)).peekable();
            if matching.peek().is_some() && !matching.any(|layer| within(&layer)) {
                idle.push(format!(
                    "adapter.targets: {part} is left out; it is in none of the blocks of adapter.layers"
                ));
            }
        }
        for number in self.layers.iter().flatten() {
            if !found.iter().any(|layer| block_of(&layer.path) == Some(*number)) {
                idle.push(format!("adapter.layers: no linear layer stands in block {number}"));
            }
        }
        Ok(idle)
    }

    /// True if a layer stands in one of the blocks.
    fn is_within(&self, path: &str) -> bool {
        block_of(path).is_some_and(|number| self.layers.as_ref().is_none_or(|layers| layers.contains(&number)))
    }

    fn chosen<'a>(&self, found: &'a [LinearLayer]) -> Result<Vec<&'a LinearLayer>, AdapterError> {
        let targets = self.targets.matcher()?;
        let named = self.targets != Targets::AllLinear;
        let wanted = |layer: &&LinearLayer| targets.matches(&layer.path) && (named || !layer.embedding);
        let mut chosen: Vec<&LinearLayer> = found.iter().filter(wanted).collect();
        if let Some(exclude) = &self.exclude {
            let exclude = exclude.matcher()?;
            chosen.retain(|layer| !exclude.matches(&layer.path));
        }
        if let Some(layers) = self.layers.as_ref().filter(|_| !chosen.is_empty()) {
            chosen.retain(|layer| self.is_within(&layer.path));
            if chosen.is_empty() {
                let last = found.iter().filter_map(|layer| block_of(&layer.path)).max();
                return Err(AdapterError::Setting {
                    key: "adapter.layers".into(),
                    value: format!("{layers:?}"),
                    reason: match last {
                        Some(last) => format!(
                            "no linear layer of {} stands in these blocks; the model has blocks 0 to {last}",
                            self.targets
                        ),
                        None => "the model has no blocks; remove it".into(),
                    },
                });
            }
        }
        match chosen.is_empty() {
            true => Err(AdapterError::NoMatch { what: self.targets.to_string(), known: names(found.iter()) }),
            false => Ok(chosen),
        }
    }
}

/// Index of the block that contains a layer.
fn block_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

fn names<'a>(layers: impl Iterator<Item = &'a LinearLayer>) -> String {
    layers.take(8).map(|layer| layer.path.as_str()).collect::<Vec<_>>().join(", ")
}

struct Pattern<T> {
    name: NamePattern,
    value: T,
}

impl<T: Copy> Pattern<T> {
    fn all(pairs: &[(String, T)]) -> Result<Vec<Self>, AdapterError> {
        pairs.iter().map(|(text, value)| Ok(Self { name: NamePattern::new(text)?, value: *value })).collect()
    }
}

fn first<T: Copy>(patterns: &[Pattern<T>], path: &str) -> Option<T> {
    patterns.iter().find(|pattern| pattern.name.matches(path)).map(|pattern| pattern.value)
}
