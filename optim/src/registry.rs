//! The list of optimizers: what the program offers, the documentation lists and the conformance tests run.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::ParamGroup;
use burn::optim::ModuleOptimizer;

use crate::{AdamWConfig, DctAdamWConfig, Norm, OptimError, Side, StateMeter};

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
            Self::Number(value) if *value != 0.0 && value.abs() < 1e-3 => write!(f, "{value:e}"),
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
    pub state_bytes: fn(&Options, [usize; 2]) -> Result<usize, OptimError>,
    build: fn(&Options, &Groups, &StateMeter) -> Result<ModuleOptimizer, OptimError>,
}

/// All optimizers.
pub static METHODS: &[Method] = &[
    Method {
        name: "adamw",
        paper: Paper { title: "Decoupled Weight Decay Regularization", arxiv: "1711.05101" },
        summary: "Adam with decoupled weight decay, two full moments",
        state: "2 RC",
        options: Vec::new,
        state_bytes: |_, [rows, columns]| Ok(8 * rows * columns),
        build: |options, groups, meter| with_adamw(options, groups, meter),
    },
    Method {
        name: "dct-adamw",
        paper: Paper {
            title: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
            arxiv: "2505.17967",
        },
        summary: "AdamW on the DCT coefficients that carry most of the gradient",
        state: "2 n_max r + r indices + rest (RC bytes)",
        options: dct_options,
        state_bytes: |options, shape| Ok(dct_config(options)?.state_bytes(shape)),
        build: |options, groups, meter| {
            let method = meter.watch(dct_config(options)?.build());
            Ok(with_adamw(options, groups, meter)?.with_group(groups.hidden.clone(), method, None))
        },
    },
];

/// AdamW for every parameter, with decay for matrices.
fn with_adamw(options: &Options, groups: &Groups, meter: &StateMeter) -> Result<ModuleOptimizer, OptimError> {
    let config = AdamWConfig::new()
        .with_beta_1(number(options, "beta_1")?)
        .with_beta_2(number(options, "beta_2")?)
        .with_epsilon(number(options, "epsilon")?);
    let decaying = config.clone().with_weight_decay(number(options, "weight_decay")?);
    Ok(config.init().with_group(ParamGroup::all(), meter.watch(config.build()), None).with_group(
        groups.matrices.clone(),
        meter.watch(decaying.build()),
        None,
    ))
}

fn dct_options() -> Vec<OptionSpec> {
    use OptionValue::{Count, Flag, Word};
    let spec = |name, default, help| OptionSpec { name, default, help };
    vec![
        spec(
            "rank",
            None,
            "basis vectors that are kept, at least 1; a matrix whose projected side is smaller takes AdamW",
        ),
        spec("update_proj_gap", Some(Count(1)), "steps between choices of basis vectors, at least 1"),
        spec("side", Some(Word("std")), "projected side: std (the smaller), left (rows), right (columns)"),
        spec("basis", Some(Word("dct3")), "dct3 or dct2"),
        spec("transform", Some(Word("matmul")), "matmul or fft; speed alone"),
        spec("norm", Some(Word("l1")), "score of a basis vector: l1 or l2"),
        spec("rotate", Some(Flag(true)), "whether moments move with their basis vectors"),
        spec("error_feedback", Some(Word("quantised")), "what the projection leaves out: none, full, quantised"),
        spec(
            "error_levels",
            Some(Count(255)),
            "steps of the quantisation, 1 to 255; up to 15 a value takes half a byte",
        ),
        spec("max_shape", Some(Count(32_000)), "matrices with a side of this size or more take AdamW"),
    ]
}

fn dct_config(options: &Options) -> Result<DctAdamWConfig, OptimError> {
    let levels = match word(options, "error_feedback", &["none", "full", "quantised"])? {
        2 => count(options, "error_levels", 1..=255)? as u8,
        _ => 0,
    };
    Ok(DctAdamWConfig::new(count(options, "rank", 1..=usize::MAX)?)
        .with_update_proj_gap(count(options, "update_proj_gap", 1..=usize::MAX)?)
        .with_side([Side::Std, Side::Left, Side::Right][word(options, "side", &["std", "left", "right"])?])
        .with_dct2(word(options, "basis", &["dct3", "dct2"])? == 1)
        .with_fft(word(options, "transform", &["matmul", "fft"])? == 1)
        .with_norm([Norm::L1, Norm::L2][word(options, "norm", &["l1", "l2"])?])
        .with_rotate(flag(options, "rotate")?)
        .with_error_feedback(word(options, "error_feedback", &["none", "full", "quantised"])? > 0)
        .with_error_levels(levels)
        .with_max_shape(count(options, "max_shape", 1..=usize::MAX)?)
        .with_beta_1(number(options, "beta_1")?)
        .with_beta_2(number(options, "beta_2")?)
        .with_epsilon(number(options, "epsilon")?)
        .with_weight_decay(number(options, "weight_decay")?))
}

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

fn refused(options: &Options, option: &'static str, reason: String) -> OptimError {
    let value = options.get(option).map_or("not given".into(), ToString::to_string);
    OptimError::Value { option, value, reason }
}

/// A whole number within a range.
fn count(options: &Options, option: &'static str, range: std::ops::RangeInclusive<usize>) -> Result<usize, OptimError> {
    let value = match options.get(option) {
        Some(OptionValue::Count(value)) => usize::try_from(*value).ok(),
        _ => None,
    };
    value.filter(|value| range.contains(value)).ok_or_else(|| {
        let limit = match *range.end() {
            usize::MAX => format!("it must be a whole number, {} or greater", range.start()),
            most => format!("it must be a whole number from {} to {most}", range.start()),
        };
        refused(options, option, limit)
    })
}

/// True or false.
fn flag(options: &Options, option: &'static str) -> Result<bool, OptimError> {
    match options.get(option) {
        Some(OptionValue::Flag(value)) => Ok(*value),
        _ => Err(refused(options, option, "it must be true or false".into())),
    }
}

/// The place of a word among those allowed.
fn word(options: &Options, option: &'static str, allowed: &[&str]) -> Result<usize, OptimError> {
    let given = match options.get(option) {
        Some(OptionValue::Word(word)) => Some(*word),
        Some(OptionValue::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    let place = given.and_then(|given| allowed.iter().position(|word| *word == given));
    place.ok_or_else(|| refused(options, option, format!("it must be one of {}", allowed.join(", "))))
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

    /// Steps a matrix and a vector; gives the optimizer back with the bytes of the matrix's state.
    fn bytes_after_a_step(method: &Method, options: &Options, shape: [usize; 2]) -> u64 {
        use burn::module::Module;
        use burn::nn::LinearConfig;
        use burn::optim::GradientsParams;
        use burn::tensor::{Device, Tensor};
        let layer = LinearConfig::new(shape[0], shape[1]).with_bias(false).init(&Device::default().autodiff());
        let (meter, all) = (StateMeter::new(), ParamGroup::all());
        let mut optimizer = method.init(options, &Groups { hidden: all.clone(), matrices: all }, &meter).unwrap();
        let mut bytes = 0;
        let mut layer = layer;
        for step in 0..3 {
            let x = Tensor::<2>::ones([2, shape[0]], &Device::default().autodiff()) * step;
            let grads = GradientsParams::from_grads(layer.forward(x).square().sum().backward(), &layer);
            meter.start();
            layer = optimizer.step(0.1, layer, grads);
            bytes = meter.stop();
            let finite = layer.weight.val().inner().is_finite().all().into_scalar::<bool>();
            assert!(finite, "{}", method.name);
        }
        assert_eq!(layer.num_params(), shape[0] * shape[1]);
        bytes
    }

    #[test]
    fn states_take_the_bytes_of_the_formula() {
        for method in METHODS {
            let mut options = Options::new();
            if (method.options)().iter().any(|option| option.name == "rank") {
                options.insert("rank".into(), OptionValue::Count(3));
            }
            let variants: &[(&str, OptionValue)] = match method.name {
                "dct-adamw" => &[
                    ("error_feedback", OptionValue::Word("none")),
                    ("error_feedback", OptionValue::Word("full")),
                    ("error_levels", OptionValue::Count(255)),
                    ("error_levels", OptionValue::Count(15)),
                    ("side", OptionValue::Word("left")),
                ],
                _ => &[("beta_1", OptionValue::Number(0.9))],
            };
            for (name, value) in variants {
                options.insert(name.to_string(), value.clone());
                let complete = method.complete(&options).unwrap();
                for shape in [[8, 5], [5, 8], [7, 7], [1, 9], [3, 3], [2, 40]] {
                    let expected = (method.state_bytes)(&complete, shape).unwrap() as u64;
                    assert_eq!(
                        bytes_after_a_step(method, &options, shape),
                        expected,
                        "{} {shape:?} {options:?}",
                        method.name
                    );
                }
                options.remove("error_feedback");
            }
        }
    }

    #[test]
    fn senseless_options_of_the_projection_are_refused() {
        let method = find("dct-adamw").unwrap();
        let all = ParamGroup::all();
        let groups = Groups { hidden: all.clone(), matrices: all };
        let message = |name: &str, value: OptionValue| {
            let mut options = Options::from([("rank".to_string(), OptionValue::Count(4))]);
            options.insert(name.to_string(), value);
            method.init(&options, &groups, &StateMeter::new()).err().unwrap().to_string()
        };
        for (name, value) in [
            ("rank", OptionValue::Count(0)),
            ("rank", OptionValue::Number(2.5)),
            ("update_proj_gap", OptionValue::Count(0)),
            ("side", OptionValue::Text("top".into())),
            ("basis", OptionValue::Text("dct4".into())),
            ("norm", OptionValue::Text("l3".into())),
            ("error_levels", OptionValue::Count(256)),
            ("error_levels", OptionValue::Count(0)),
            ("rotate", OptionValue::Count(1)),
        ] {
            assert!(message(name, value).contains(name), "{name}");
        }
        let missing = method.init(&Options::new(), &groups, &StateMeter::new()).err().unwrap().to_string();
        assert!(missing.contains("rank"), "{missing}");
    }
}
