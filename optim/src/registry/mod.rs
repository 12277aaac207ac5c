//! Registry: one kind of entry for every method, and one statement of each option.
//!
//! An option is a field of the method's configuration. Its doc comment is the help, its default that of the standard configuration, and what it
//! allows is stated next to it for [`schemars`]. Help, documentation, the JSON schema and all rejections follow from that:
//!
//! ```
//! use burn::config::Config;
//! use lowrank_optim::registry::{Entry, Kind, OptionList, find, validate};
//! use schemars::JsonSchema;
//!
//! /// Configuration of a training rule.
//! #[derive(Config, Debug, JsonSchema)]
//! pub struct WarmConfig {
//!     /// Ratio of the learning rates of B and A.
//!     #[config(default = 16.0)]
//!     #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
//!     pub ratio: f64,
//!     /// Number of components.
//!     #[config(default = 4)]
//!     #[schemars(range(min = 1, max = 64))]
//!     pub parts: usize,
//! }
//!
//! /// One line of a list of entries; a list may also hold a type with an entry ([`Registered`](lowrank_optim::registry::Registered)).
//! static RULES: &[Entry] = &[Entry {
//!     options: || OptionList::of(&WarmConfig::new()),
//!     ..Entry::plain(Kind::Rule, "warm", "faster B")
//! }];
//!
//! let rule = find(Kind::Rule, RULES, "warm").unwrap();
//! let given = serde_json::json!({ "ratio": 4 }).as_object().cloned().unwrap();
//! let config: WarmConfig = rule.configure(&given).unwrap();
//! assert_eq!((config.ratio, config.parts), (4.0, 4));
//!
//! let given = serde_json::json!({ "ratio": -1 }).as_object().cloned().unwrap();
//! let refusal = rule.configure::<WarmConfig>(&given).unwrap_err().under("rule.options");
//! assert_eq!(refusal.to_string(), "rule.options.ratio = -1: must be a number greater than 0 and at most 1000000");
//! assert!(find(Kind::Rule, RULES, "wram").unwrap_err().to_string().contains("did you mean \"warm\"?"));
//! // A configuration made in code meets the same checks.
//! assert!(validate(&WarmConfig::new().with_parts(65)).is_err());
//! ```
//!
//! - Plain `serde` structs with `Default` serve as well as Burn's `Config`; an enum of words derives `JsonSchema` too, its variants documented.
//! - A field that is a struct is a group: its fields are options of the method, as the four of
//!   [`AdamOptions`](crate::AdamOptions) are. Names of options are unique within a method.
//! - `extend("enum" = [0, 4, 8])` lists allowed values, `extend("anyOf" = [{ "const": 0 }, { "exclusiveMinimum": 1 }])` states alternatives,
//!   `extend("x-required" = true)` marks an option without a default, and `extend("x-unset" = "...")` describes the value of an optional
//!   one if it is not set.
//! - Conditions on several options are checked in code, with an [`OptionError::value`] that names one of them.

pub(crate) mod allowed;
pub(crate) mod entry;
pub(crate) mod find;
pub(crate) mod method;
mod nearest;
mod optimizers;
pub(crate) mod options;

pub use allowed::{Allowed, Choice};
pub use entry::{Entry, Kind, Paper, Registered};
pub use find::{UnknownName, find, find_any};
pub use method::{Built, Method};
pub use nearest::nearest;
pub use optimizers::{METHODS, optimizer};
pub use options::{OptionError, OptionList, OptionSpec, Options, validate};

pub use crate::method::MethodConfig;

#[cfg(test)]
mod tests;
