//! The list of parameterizations: one line each.

use burn::module::Module;
use burn::tensor::Tensor;
use lowrank_optim::registry::{Entry, Kind, OptionError, Options, Registered, UnknownName, find, validate};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::dense::DenseOptions;
use super::layer::LinearLayer;
use super::parameterization::{LinearMethod, ParameterizationSpec};
use super::{cola, dense, loro, lost, low_rank, relora, sltrain};
use crate::error::ModelError;
use crate::weights::{Builder, Init};

macro_rules! parameterizations {
    ($($file:ident: $variant:ident($options:ident, $layer:ident)),* $(,)?) => {
        /// Parameterization of the linear layers of the blocks; the embedding, the head and the norms are always dense.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(into = "Options", try_from = "Options")]
        #[allow(missing_docs)] // the variants are the lines of the list below
        pub enum Parameterization {
            $($variant($file::$options),)*
        }

        impl Parameterization {
            /// Its options.
            pub fn method(&self) -> &dyn LinearMethod {
                match self {
                    $(Self::$variant(options) => options,)*
                }
            }

            /// Description.
            pub fn spec(&self) -> &'static ParameterizationSpec {
                match self {
                    $(Self::$variant(_) => <$file::$options as LinearMethod>::spec(),)*
                }
            }

            /// Rejects values that are not allowed.
            pub fn validate(&self) -> Result<(), OptionError> {
                match self {
                    $(Self::$variant(options) => validate(options).and_then(|()| options.check()),)*
                }
            }

            fn options(&self) -> Options {
                match self {
                    $(Self::$variant(options) => object(options),)*
                }
            }
        }

        /// A linear layer.
        #[derive(Module, Debug)]
        #[allow(missing_docs)] // the variants are the lines of the list below
        pub enum Linear {
            $($variant($file::$layer),)*
        }

        impl Linear {
            pub(crate) fn build(
                builder: &mut Builder,
                path: &str,
                shape @ [d_in, d_out]: [usize; 2],
                has_bias: bool,
                parameterization: &Parameterization,
            ) -> Result<Self, ModelError> {
                let checked = parameterization.method().check_shape(shape);
                checked.map_err(|reason| ModelError::Config(format!("{path}, {d_in} x {d_out}: {reason}")))?;
                let mut linear = match parameterization {
                    $(Parameterization::$variant(options) => Self::$variant(options.build(builder, path, shape)?),)*
                };
                if has_bias {
                    let bias = builder.vector(&format!("{path}.bias"), d_out, Init::Constant(0.0))?;
                    *linear.layer_mut().bias_mut() = Some(bias);
                }
                Ok(linear)
            }

            /// The layer.
            pub fn layer(&self) -> &(dyn LinearLayer + 'static) {
                match self {
                    $(Self::$variant(layer) => layer,)*
                }
            }

            /// Mutable variant of [`Linear::layer`].
            pub fn layer_mut(&mut self) -> &mut (dyn LinearLayer + 'static) {
                match self {
                    $(Self::$variant(layer) => layer,)*
                }
            }
        }

        /// All parameterizations.
        pub static PARAMETERIZATIONS: &[ParameterizationEntry] = &[
            $(ParameterizationEntry {
                spec: <$file::$options as LinearMethod>::spec,
                parse: |entry, given| entry.configure(given).map(Parameterization::$variant),
            },)*
        ];
    };
}

parameterizations! {
    dense: Dense(DenseOptions, Dense),
    low_rank: LowRank(LowRankOptions, LowRank),
    sltrain: SlTrain(SlTrainOptions, SlTrain),
    cola: Cola(ColaOptions, Cola),
    lost: Lost(LostOptions, Lost),
    relora: ReLora(ReLoraOptions, ReLora),
    loro: Loro(LoroOptions, Loro),
}

/// A parameterization of the list.
#[derive(Clone, Copy, Debug)]
pub struct ParameterizationEntry {
    spec: fn() -> &'static ParameterizationSpec,
    parse: fn(&Entry, &Options) -> Result<Parameterization, OptionError>,
}

impl Registered for ParameterizationEntry {
    fn entry(&self) -> &Entry {
        &self.spec().entry
    }
}

impl ParameterizationEntry {
    /// The entry of a name.
    pub fn find(name: &str) -> Result<&'static Self, UnknownName> {
        find(Kind::Parameterization, PARAMETERIZATIONS, name)
    }

    /// Description.
    pub fn spec(&self) -> &'static ParameterizationSpec {
        (self.spec)()
    }

    /// The parameterization with these options, and the defaults of the others.
    pub fn parse(&self, given: &Options) -> Result<Parameterization, OptionError> {
        let parameterization = (self.parse)(self.entry(), given)?;
        parameterization.method().check()?;
        Ok(parameterization)
    }
}

impl Parameterization {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.spec().name
    }

    /// Returns true if the layers hold dense weights.
    pub fn is_dense(&self) -> bool {
        matches!(self, Self::Dense(_))
    }
}

impl Default for Parameterization {
    fn default() -> Self {
        Self::Dense(DenseOptions {})
    }
}

impl From<Parameterization> for Options {
    fn from(parameterization: Parameterization) -> Self {
        let mut map = parameterization.options();
        map.insert("name".to_string(), Value::from(parameterization.name()));
        map
    }
}

/// Conversion from the form in model files: the name and all options.
impl TryFrom<Options> for Parameterization {
    type Error = ModelError;

    fn try_from(mut map: Options) -> Result<Self, ModelError> {
        let name = map.remove("name");
        let Some(Value::String(name)) = name else {
            return Err(ModelError::Config("a parameterization has a name, which is a text".to_string()));
        };
        let entry = ParameterizationEntry::find(&name)?;
        let options = entry.spec().options();
        if let Some(missing) = options.iter().find(|option| !map.contains_key(&option.name)) {
            let missing = &missing.name;
            return Err(ModelError::Config(format!("{name} without {missing}: all its options must be given")));
        }
        Ok(entry.parse(&map)?)
    }
}

impl Linear {
    /// `x [rows, d_in]` to `[rows, d_out]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.layer().forward(x)
    }

    /// The dense weight `[d_in, d_out]` that gives the same outputs, without gradient; none if a non-linearity separates the factors.
    pub fn to_dense(&self) -> Option<Tensor<2>> {
        self.layer().to_dense()
    }
}

fn object(options: &impl Serialize) -> Options {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        other => unreachable!("options are a struct of numbers, flags and words: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameterization_reads_back_as_model_files_hold_it() {
        for entry in PARAMETERIZATIONS {
            let parameterization = entry.parse(&Options::new()).unwrap();
            let written = serde_json::to_value(&parameterization).unwrap();
            assert_eq!(written["name"], entry.spec().name);
            assert_eq!(serde_json::from_value::<Parameterization>(written.clone()).unwrap(), parameterization);
            for option in entry.spec().options().iter().map(|option| &option.name) {
                let mut short = written.clone();
                short.as_object_mut().unwrap().remove(option);
                let error = serde_json::from_value::<Parameterization>(short).unwrap_err().to_string();
                assert!(error.contains(option), "{error}");
            }
        }
    }

    #[test]
    fn refusals_name_the_option_and_what_is_allowed() {
        let refused = |name: &str, option: &str, value: Value| {
            let given = Options::from_iter([(option.to_string(), value)]);
            ParameterizationEntry::find(name).unwrap().parse(&given).unwrap_err().to_string()
        };
        for (name, option, value, reason) in [
            ("sltrain", "rank", Value::from(0), "at least 1"),
            ("sltrain", "rank", Value::from("wide"), "whole number"),
            ("sltrain", "ranks", Value::from(4), "did you mean \"rank\"?"),
            ("dense", "rank", Value::from(4), "it has none"),
            ("relora", "reset", Value::from("most"), "magnitude:0.9"),
            ("lost", "gamma", Value::from(2.0), "from 0 to 1"),
        ] {
            let error = refused(name, option, value);
            assert!(error.contains(option) && error.contains(reason), "{error}");
        }
        let error = ParameterizationEntry::find("low_rank").unwrap_err().to_string();
        assert!(error.contains("\"low_rank\"") && error.contains("did you mean \"low-rank\"?"), "{error}");
    }
}
