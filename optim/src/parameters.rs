//! Roles of a module's parameters, and the optimizer of each.

use std::fmt;

use burn::module::{Module, Param, ParamGroup, ParamId};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::Tensor;
use lowrank_kernels::random::key_of;
use regex::Regex;

use crate::change::WeightChange;
use crate::error::OptimError;
use crate::matrix_id::MatrixId;
use crate::method::{MethodConfig, Table};
use crate::methods::adamw::AdamW;
use crate::path::{ModulePath, ParameterVisitor, visit_parameters};
use crate::registry::options::OptionError;
use crate::state::meter::StateMeter;
use crate::state::rate::AtRate;
use crate::state::reset::{MomentResets, ResetMoments};
use crate::storage::{Narrow, WeightStorage};

/// Role of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix inside the model.
    Hidden,
    /// A matrix that maps ids to vectors.
    Embedding,
    /// The last matrix, which gives the outputs.
    Head,
    /// A matrix that a pattern excluded.
    Excluded,
    /// Not a matrix: norms, biases, kernels of convolutions.
    Other,
    /// The training rule has already turned the gradient into the update; apply plain SGD.
    Descent,
}

/// A parameter with its role.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Path in the module.
    pub path: String,
    /// Id.
    pub id: ParamId,
    /// Shape.
    pub shape: Vec<usize>,
    /// Role.
    pub role: Role,
    /// True if it is trained.
    pub trained: bool,
    /// True if weight decay acts on it; by default on matrices only.
    pub decays: bool,
    /// Its learning rate as a multiple of that of the step.
    pub lr_scale: f64,
}

/// The parameters of a module by role, to give its hidden matrices an optimizer of their own.
///
/// A matrix is an embedding when it lies in a module `Embedding` or in a field `embed...`, `wte` or `wpe`; the head when it lies in a field
/// `lm_head`, `head`, `output`, `classifier`, `score`, `unembed...`; else hidden. Patterns decide otherwise.
///
/// ```no_run
/// # use lowrank_optim::{DctAdamWConfig, ParameterRoles, StateMeter};
/// # fn example(model: burn::nn::Linear) -> Result<(), lowrank_optim::OptimError> {
/// let hidden = ParameterRoles::of(&model).excluding("gate")?;
/// let mut optimizer = hidden.optimizer(&DctAdamWConfig::new(64), &StateMeter::new())?;
/// println!("{hidden}");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ParameterRoles {
    parameters: Vec<Parameter>,
    /// Storage of the trained matrices, and the seed of its draws.
    storage: (WeightStorage, u64),
}

impl ParameterRoles {
    /// Assigns roles to all parameters of a module.
    pub fn of<M: Module>(module: &M) -> Self {
        let mut finder = Finder::default();
        visit_parameters(module, &mut finder);
        Self { parameters: finder.found, storage: (WeightStorage::F32, 0) }
    }

    /// With matrices in this storage, whose draws have this seed; the module must hold them so ([`Narrow`]).
    pub fn stored(self, storage: WeightStorage, seed: u64) -> Self {
        Self { storage: (storage, seed), ..self }
    }

    /// Only parameters that are trained, as `tune` would have them: with another role, learning rate or decay.
    pub fn trained(mut self, mut tune: impl FnMut(&mut Parameter)) -> Self {
        self.parameters.retain(|parameter| parameter.trained);
        self.parameters.iter_mut().for_each(&mut tune);
        self
    }

    /// Counts matrices whose path matches as hidden.
    pub fn including(self, pattern: &str) -> Result<Self, OptimError> {
        self.turn(pattern, "include", Role::Hidden)
    }

    /// Counts matrices whose path matches as not hidden.
    pub fn excluding(self, pattern: &str) -> Result<Self, OptimError> {
        self.turn(pattern, "exclude", Role::Excluded)
    }

    fn turn(mut self, pattern: &str, option: &'static str, role: Role) -> Result<Self, OptimError> {
        let refuse = |reason: String| OptimError::from(OptionError::value(option, pattern, reason));
        let regex = Regex::new(pattern).map_err(|error| refuse(error.to_string()))?;
        let mut matched = 0;
        for parameter in self.parameters.iter_mut().filter(|parameter| regex.is_match(&parameter.path)) {
            if parameter.role == Role::Descent {
                let reason = format!("{} is updated by its training rule; remove the pattern", parameter.path);
                return Err(refuse(reason));
            }
            if parameter.shape.len() == 2 {
                parameter.role = role;
                matched += 1;
            }
        }
        if matched == 0 {
            let paths: Vec<&str> = self.matrices().map(|parameter| parameter.path.as_str()).take(8).collect();
            return Err(refuse(format!("no matrix has such a path; there are {}", paths.join(", "))));
        }
        Ok(self)
    }

    /// All parameters.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn matrices(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().filter(|parameter| parameter.shape.len() == 2)
    }

    fn hidden(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().filter(|parameter| parameter.role == Role::Hidden)
    }

    /// The group of hidden matrices, for [`ModuleOptimizer::with_group`]; having none is an error.
    pub fn group(&self) -> Result<ParamGroup, OptimError> {
        let ids: Vec<ParamId> = self.hidden().map(|parameter| parameter.id).collect();
        if ids.is_empty() {
            return Err(OptimError::NothingToProject { paths: self.paths() });
        }
        Ok(ParamGroup::from_ids(ids))
    }

    fn paths(&self) -> String {
        let paths: Vec<String> = self.parameters.iter().map(|p| format!("{} {:?}", p.path, p.shape)).take(8).collect();
        paths.join(", ")
    }

    /// The optimizer of the module: the method for hidden matrices, AdamW of the same kind for everything else, with decay for matrices alone.
    /// States report to the meter. Random draws depend on the paths of matrices, not on the order of steps.
    pub fn optimizer<C: MethodConfig>(&self, config: &C, meter: &StateMeter) -> Result<ModuleOptimizer, OptimError> {
        self.assemble(config, meter, |others, _| others, |method, _| method)
    }

    /// As [`ParameterRoles::optimizer`], of an optimizer whose moments can be reset through the handle.
    pub fn resettable<C: MethodConfig>(
        &self,
        config: &C,
        meter: &StateMeter,
        resets: &MomentResets,
    ) -> Result<ModuleOptimizer, OptimError>
    where
        C::Optimizer: ResetMoments,
    {
        self.assemble(config, meter, |others, key| resets.follow(others, key), |method, key| resets.follow(method, key))
    }

    /// Every parameter has an optimizer of its own, which `method` or `others` may wrap; they get a key of its path.
    pub(crate) fn assemble<C: MethodConfig, O: WeightChange, P: WeightChange>(
        &self,
        config: &C,
        meter: &StateMeter,
        others: impl Fn(AdamW, u64) -> O,
        method: impl Fn(C::Optimizer, u64) -> P,
    ) -> Result<ModuleOptimizer, OptimError> {
        let shapes: Vec<[usize; 2]> = self.hidden().map(|p| [p.shape[0], p.shape[1]]).collect();
        if C::NEEDS_MATRICES {
            self.group()?;
            if !shapes.iter().any(|shape| config.takes(*shape)) {
                let largest = shapes.into_iter().max_by_key(|[rows, columns]| *rows.min(columns)).unwrap_or_default();
                return Err(OptimError::NothingFits { largest });
            }
        }
        let plain = |decays: bool| {
            let others = config.others();
            if decays { others.build() } else { others.with_weight_decay(0.0).build() }
        };
        // Matrices that are appended to the module in the course of a run.
        let appended = meter.watch(AtRate { optimizer: plain(true), lr_scale: 1.0 });
        let mut optimizer = ModuleOptimizer::from(plain(true)).with_group(ParamGroup::all(), appended, None);
        let mut number = 0;
        for parameter in &self.parameters {
            let key = key_of(&parameter.path);
            let lr_scale = parameter.lr_scale;
            optimizer = match parameter.role {
                Role::Hidden => {
                    let place = MatrixId { key, number, count: shapes.len() };
                    number += 1;
                    let optimizer_of = method(C::at(config.optimizer()?, place), key);
                    self.watched(optimizer, meter, AtRate { optimizer: optimizer_of, lr_scale }, parameter)
                }
                Role::Descent => {
                    let descent = SgdConfig::new().build();
                    self.watched(optimizer, meter, AtRate { optimizer: descent, lr_scale }, parameter)
                }
                _ if let Some(table) = self.table(parameter).and_then(|table| config.of_table(table)) => {
                    let place = MatrixId { key, number: 0, count: 0 };
                    let optimizer_of = method(C::at(table, place), key);
                    self.watched(optimizer, meter, AtRate { optimizer: optimizer_of, lr_scale }, parameter)
                }
                _ => {
                    let others = others(plain(parameter.decays), key);
                    self.watched(optimizer, meter, AtRate { optimizer: others, lr_scale }, parameter)
                }
            };
        }
        Ok(optimizer)
    }

    /// Adds the optimizer of one parameter.
    fn watched<O: WeightChange>(
        &self,
        optimizer: ModuleOptimizer,
        meter: &StateMeter,
        own: O,
        parameter: &Parameter,
    ) -> ModuleOptimizer {
        let group = ParamGroup::from_ids(vec![parameter.id]);
        match (self.storage, parameter.shape.len()) {
            ((WeightStorage::F32, _), _) => optimizer.with_group(group, meter.watch(own), None),
            ((storage, seed), 2) => {
                let narrow = Narrow::new(own, storage, seed, key_of(&parameter.path));
                optimizer.with_group(group, meter.watch(narrow), None)
            }
            _ => optimizer.with_group(group, meter.watch(own), None),
        }
    }

    /// Kind of an embedding or head. The only embedding of a module without a head serves as its head.
    pub fn table(&self, parameter: &Parameter) -> Option<Table> {
        let of = |role: Role| self.parameters.iter().filter(move |parameter| parameter.role == role).count();
        match parameter.role {
            Role::Embedding if of(Role::Head) == 0 && of(Role::Embedding) == 1 => Some(Table::Tied),
            Role::Embedding => Some(Table::Embedding),
            Role::Head => Some(Table::Head),
            _ => None,
        }
    }

    /// Optimizer of each parameter.
    pub fn report<C: MethodConfig>(&self, config: &C, name: &'static str) -> Vec<Assignment> {
        let who = |parameter: &Parameter| match (parameter.role, parameter.shape.as_slice()) {
            (Role::Hidden, [rows, columns]) if config.takes([*rows, *columns]) => AssignedTo::Method(name),
            (Role::Hidden, _) => AssignedTo::TooSmall(name),
            (Role::Descent, _) => AssignedTo::Descent,
            _ => match self.table(parameter) {
                Some(table) if config.of_table(table).is_some() => AssignedTo::Table(name, table),
                _ => AssignedTo::AdamW,
            },
        };
        self.parameters.iter().map(|p| Assignment { parameter: p.clone(), optimizer: who(p) }).collect()
    }
}

/// A parameter and its optimizer; displayed as one line.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The parameter.
    pub parameter: Parameter,
    /// Its optimizer.
    pub optimizer: AssignedTo,
}

/// Optimizer of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AssignedTo {
    /// The method of this name.
    Method(&'static str),
    /// The method of this name, as an embedding or head.
    Table(&'static str, Table),
    /// AdamW, because the matrix is too small for the method of this name.
    TooSmall(&'static str),
    /// AdamW.
    AdamW,
    /// Plain SGD: a rule has already turned the gradient into the update.
    Descent,
}

impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parameter { path, shape, role, .. } = &self.parameter;
        write!(f, "{path} {shape:?} {role}: ")?;
        match self.optimizer {
            AssignedTo::Method(name) | AssignedTo::Table(name, Table::Embedding | Table::Head) => f.write_str(name),
            AssignedTo::Table(name, Table::Tied) => write!(f, "{name}, as embedding and head"),
            AssignedTo::TooSmall(name) => write!(f, "adamw (its projected side is smaller than the rank of {name})"),
            AssignedTo::AdamW => f.write_str("adamw"),
            AssignedTo::Descent => f.write_str("descent along what the training rule gives"),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hidden => "hidden matrix",
            Self::Embedding => "embedding",
            Self::Head => "head",
            Self::Excluded => "excluded matrix",
            Self::Other => "not a matrix",
            Self::Descent => "factor of a rule",
        })
    }
}

impl fmt::Display for ParameterRoles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for parameter in &self.parameters {
            writeln!(f, "{} {:?} {}", parameter.path, parameter.shape, parameter.role)?;
        }
        Ok(())
    }
}

/// Returns the role of a matrix at this path.
fn role(path: &ModulePath) -> Role {
    let named = |words: &[&str], starts: &[&str]| {
        let is = |part: &str| words.contains(&part) || starts.iter().any(|start| part.starts_with(start));
        path.names().any(is)
    };
    if path.containers().any(|container| container.ends_with(":Embedding")) || named(&["wte", "wpe"], &["embed"]) {
        return Role::Embedding;
    }
    if named(&["lm_head", "head", "output", "classifier", "score"], &["unembed"]) {
        return Role::Head;
    }
    Role::Hidden
}

#[derive(Default)]
struct Finder {
    found: Vec<Parameter>,
}

impl ParameterVisitor for Finder {
    fn float<const D: usize>(&mut self, path: &ModulePath, param: &Param<Tensor<D>>) {
        let role = if D == 2 { role(path) } else { Role::Other };
        let (trained, decays) = (param.is_require_grad(), D == 2);
        let shape = param.shape().as_slice().to_vec();
        self.found.push(Parameter { path: path.joined(), id: param.id, shape, role, trained, decays, lr_scale: 1.0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::galore::GaLoreConfig;
    use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Classifier {
        words: Embedding,
        layers: Vec<Linear>,
        norm: LayerNorm,
        head: Linear,
    }

    fn classifier() -> Classifier {
        let device = Device::default();
        Classifier {
            words: EmbeddingConfig::new(20, 8).init(&device),
            layers: (0..2).map(|_| LinearConfig::new(8, 8).init(&device)).collect(),
            norm: LayerNormConfig::new(8).init(&device),
            head: LinearConfig::new(8, 3).init(&device),
        }
    }

    fn hidden(matrices: &ParameterRoles) -> Vec<&str> {
        matrices.hidden().map(|parameter| parameter.path.as_str()).collect()
    }

    #[test]
    fn roles_follow_types_and_names_and_patterns_win() {
        let all = ParameterRoles::of(&classifier());
        assert_eq!(hidden(&all), ["layers.0.weight", "layers.1.weight"]);
        let role = |path: &str| all.parameters.iter().find(|p| p.path == path).unwrap().role;
        assert_eq!(role("words.weight"), Role::Embedding);
        assert_eq!(role("head.weight"), Role::Head);
        assert_eq!(role("layers.0.bias"), Role::Other);
        let fewer = all.clone().excluding(r"layers\.0").unwrap().including("head").unwrap();
        assert_eq!(hidden(&fewer), ["layers.1.weight", "head.weight"]);
        assert!(all.to_string().contains("words.weight [20, 8] embedding"));
    }

    #[test]
    fn matching_nothing_is_an_error() {
        let all = ParameterRoles::of(&classifier());
        assert!(all.clone().excluding("attention").unwrap_err().to_string().contains("layers.0.weight"));
        assert!(all.clone().including("(").is_err());
        let none = all.clone().excluding("layers").unwrap();
        assert!(none.group().unwrap_err().to_string().contains("words.weight"));
        let meter = StateMeter::new();
        assert!(all.optimizer(&GaLoreConfig::new(9), &meter).is_err(), "no matrix has a side of 9");
        assert!(all.optimizer(&GaLoreConfig::new(8), &meter).is_ok());
    }
}
