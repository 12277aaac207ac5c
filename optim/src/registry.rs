//! The list of optimizers: what the program offers, the documentation lists and the conformance tests run.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::ParamGroup;
use burn::optim::ModuleOptimizer;

use crate::{AdamWConfig, OptimError, StateMeter};

/// Where a method was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// arXiv id.
    pub arxiv: &'static str,
}

/// One option of a method.
#[derive(Clone, Debug, PartialEq)]
pub struct OptionSpec {
    /// Name, as in `optimizer.NAME`.
    pub name: &'static str,
    /// Value when it is not given; none when it must be given.
    pub default: Option<OptionValue>,
    /// What it does and what it allows, one line.
    pub help: &'static str,
}

/// Value of an option.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    /// True or false.
    Flag(bool),
    /// A whole number.
    Count(i64),
    /// A number.
    Number(f64),
    /// A word.
    Word(&'static str),
    /// A word that came from outside.
    Text(String),
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(value) => value.fmt(f),
            Self::Count(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Word(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// Options by name.
pub type Options = BTreeMap<String, OptionValue>;

/// Which parameters of a module an optimizer treats in which way.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Matrices inside the model: not the embedding, not the head.
    pub hidden: ParamGroup,
    /// All matrices; only these decay.
    pub matrices: ParamGroup,
}

/// One optimizer.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Name on the command line.
    pub name: &'static str,
    /// Where it was published.
    pub paper: Paper,
    /// One line on what it does.
    pub summary: &'static str,
    /// State of an R x C matrix, in words.
    pub state: &'static str,
    /// Its options.
    pub options: fn() -> Vec<OptionSpec>,
    /// Bytes of state for a matrix of this shape.
    pub state_bytes: fn(&Options, [usize; 2]) -> usize,
    build: fn(&Options, &Groups, &StateMeter) -> Result<ModuleOptimizer, OptimError>,
}

/// All optimizers.
pub static METHODS: &[Method] = &[Method {
    name: "adamw",
    paper: Paper { title: "Decoupled Weight Decay Regularization", arxiv: "1711.05101" },
    summary: "Adam with decoupled weight decay, two full moments",
    state: "2 RC",
    options: || vec![],
    state_bytes: |_, [rows, columns]| 8 * rows * columns,
    build: |options, groups, meter| {
        let config = AdamWConfig::new()
            .with_beta_1(number(options, "beta_1")?)
            .with_beta_2(number(options, "beta_2")?)
            .with_epsilon(number(options, "epsilon")?)
            .with_weight_decay(0.0);
        let decaying = config.clone().with_weight_decay(number(options, "weight_decay")?);
        Ok(config.init().with_group(ParamGroup::all(), meter.watch(config.build()), None).with_group(
            groups.matrices.clone(),
            meter.watch(decaying.build()),
            None,
        ))
    },
}];

/// The method of a name.
pub fn find(name: &str) -> Result<&'static Method, OptimError> {
    METHODS.iter().find(|method| method.name == name).ok_or_else(|| OptimError::UnknownMethod {
        name: name.to_string(),
        nearest: nearest(name, METHODS.iter().map(|method| method.name)),
        known: METHODS.iter().map(|method| method.name).collect::<Vec<_>>().join(", "),
    })
}

/// Options that every method has, for its own parameters and for those that take plain AdamW.
pub fn common_options() -> Vec<OptionSpec> {
    let spec = |name, default, help| OptionSpec { name, default: Some(OptionValue::Number(default)), help };
    vec![
        spec("weight_decay", 0.0, "decoupled weight decay of matrices, 0 or greater"),
        spec("beta_1", 0.9, "decay of the first moment, from 0 to below 1"),
        spec("beta_2", 0.999, "decay of the second moment, from 0 to below 1"),
        spec("epsilon", 1e-8, "added to the root of the second moment, greater than 0"),
    ]
}

impl Method {
    /// Common options and those of the method; the method's own default wins.
    pub fn all_options(&self) -> Vec<OptionSpec> {
        let own = (self.options)();
        let mut all: Vec<OptionSpec> =
            common_options().into_iter().filter(|common| own.iter().all(|spec| spec.name != common.name)).collect();
        all.extend(own);
        all
    }

    /// Checks the names of options and fills in defaults.
    pub fn complete(&self, given: &Options) -> Result<Options, OptimError> {
        let specs = self.all_options();
        for name in given.keys() {
            if specs.iter().all(|spec| spec.name != name) {
                return Err(OptimError::UnknownOption {
                    method: self.name.to_string(),
                    option: name.clone(),
                    nearest: nearest(name, specs.iter().map(|spec| spec.name)),
                    known: specs.iter().map(|spec| spec.name).collect::<Vec<_>>().join(", "),
                });
            }
        }
        let mut options = given.clone();
        for spec in specs {
            match (options.contains_key(spec.name), spec.default) {
                (true, _) => {}
                (false, Some(default)) => {
                    options.insert(spec.name.to_string(), default);
                }
                (false, None) => {
                    return Err(OptimError::Value {
                        option: spec.name,
                        value: "not given".into(),
                        reason: format!("{} needs it: {}", self.name, spec.help),
                    });
                }
            }
        }
        check_common(&options)?;
        Ok(options)
    }

    /// The optimizer for a module whose parameters fall into these groups; its states report to the meter.
    pub fn init(&self, given: &Options, groups: &Groups, meter: &StateMeter) -> Result<ModuleOptimizer, OptimError> {
        (self.build)(&self.complete(given)?, groups, meter)
    }
}

fn check_common(options: &Options) -> Result<(), OptimError> {
    let refuse = |option, value: f64, reason: &str| {
        Err(OptimError::Value { option, value: value.to_string(), reason: reason.to_string() })
    };
    for beta in ["beta_1", "beta_2"] {
        let value = number(options, beta)?;
        if !(0.0..1.0).contains(&value) {
            return refuse(beta, value, "it must be from 0 to below 1");
        }
    }
    let epsilon = number(options, "epsilon")?;
    if !(epsilon > 0.0 && epsilon.is_finite()) {
        return refuse("epsilon", epsilon, "it must be greater than 0");
    }
    let decay = number(options, "weight_decay")?;
    if !(decay >= 0.0 && decay.is_finite()) {
        return refuse("weight_decay", decay, "it must be 0 or greater");
    }
    Ok(())
}

/// A numeric option.
pub(crate) fn number(options: &Options, option: &'static str) -> Result<f64, OptimError> {
    match options.get(option) {
        Some(OptionValue::Number(value)) => Ok(*value),
        Some(OptionValue::Count(value)) => Ok(*value as f64),
        other => Err(OptimError::Value {
            option,
            value: other.map_or("not given".into(), ToString::to_string),
            reason: "it must be a number".into(),
        }),
    }
}

/// The known name with the fewest edits, when that is few enough to be a slip.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .min()
        .filter(|(edits, candidate)| *edits <= 1 + candidate.len() / 3)
        .map(|(_, candidate)| candidate.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_unknown_ones_get_the_nearest() {
        for method in METHODS {
            assert_eq!(METHODS.iter().filter(|other| other.name == method.name).count(), 1);
            assert!(std::ptr::eq(find(method.name).unwrap(), method));
        }
        assert!(find("adamv").unwrap_err().to_string().contains("did you mean \"adamw\""));
    }

    #[test]
    fn options_are_checked() {
        let adamw = find("adamw").unwrap();
        let with = |name: &str, value| adamw.complete(&Options::from([(name.to_string(), value)]));
        assert!(with("beta_1", OptionValue::Number(1.0)).unwrap_err().to_string().contains("beta_1"));
        assert!(with("epsilon", OptionValue::Number(0.0)).is_err());
        assert!(with("weight_decay", OptionValue::Number(-0.1)).is_err());
        assert!(with("weight_decay", OptionValue::Text("much".into())).is_err());
        assert!(with("beta1", OptionValue::Number(0.5)).unwrap_err().to_string().contains("did you mean \"beta_1\""));
        assert_eq!(with("beta_2", OptionValue::Number(0.95)).unwrap()["beta_2"], OptionValue::Number(0.95));
    }
}
