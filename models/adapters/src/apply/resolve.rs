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
        let rank_of = Pattern::all(&self.rank_pattern, "adapter.rank_pattern")?;
        let alpha_of = Pattern::all(&self.alpha_pattern, "adapter.alpha_pattern")?;
        for pattern in rank_of.iter().map(|p| &p.name).chain(alpha_of.iter().map(|p| &p.name)) {
            if pattern.find(chosen.iter().map(|layer| &layer.path))?.is_none() {
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
            let rank = first(&rank_of, &layer.path)?.or(self.rank);
            let rank = match (rank, usual_rank) {
                (Some(rank), _) => rank,
                (None, Rank::Fixed(rank)) => rank,
                (None, Rank::SmallerSide(most)) => layer.shape[0].min(layer.shape[1]).min(most),
                (None, Rank::None) => 0,
            };
            let alpha = first(&alpha_of, &layer.path)?.or(self.alpha);
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
        for (key, targets) in [("adapter.targets", Some(&self.targets)), ("adapter.exclude", self.exclude.as_ref())] {
            for part in targets.into_iter().flat_map(Targets::parts) {
                if matching(found, &part, key)?.is_empty() {
                    idle.push(format!("{key}: no linear layer matches {part}"));
                }
            }
        }
        for part in self.layers.iter().flat_map(|_| self.targets.parts()) {
            let matching = matching(found, &part, "adapter.targets")?;
            if !matching.is_empty() && !matching.iter().any(|layer| self.is_within(&layer.path)) {
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
        let mut chosen = matching(found, &self.targets, "adapter.targets")?;
        if self.targets == Targets::AllLinear {
            chosen.retain(|layer| !layer.embedding);
        }
        if let Some(exclude) = &self.exclude {
            let left_out = matching(found, exclude, "adapter.exclude")?;
            chosen.retain(|layer| left_out.iter().all(|other| other.path != layer.path));
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
    fn all(pairs: &[(String, T)], key: &str) -> Result<Vec<Self>, AdapterError> {
        pairs.iter().map(|(text, value)| Ok(Self { name: NamePattern::new(text, key)?, value: *value })).collect()
    }
}

fn first<T: Copy>(patterns: &[Pattern<T>], path: &str) -> Result<Option<T>, AdapterError> {
    for pattern in patterns {
        if pattern.name.matches(path)? {
            return Ok(Some(pattern.value));
        }
    }
    Ok(None)
}

/// The layers that match targets; `key` is the setting that an error names.
fn matching<'a>(found: &'a [LinearLayer], targets: &Targets, key: &str) -> Result<Vec<&'a LinearLayer>, AdapterError> {
    let matcher = targets.matcher(key)?;
    let matched = |layer: &'a LinearLayer| matcher.matches(&layer.path).map(|matches| matches.then_some(layer));
    found.iter().filter_map(|layer| matched(layer).transpose()).collect()
}
