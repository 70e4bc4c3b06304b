//! Where blobs come from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::value::Endpoint;
use super::value::Secret;
use super::value::choice;

/// A backend: the place, and what all backends know. Timeouts, retries and routes have no effect on local places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// The place.
    pub source: Source,
    /// Bounds one attempt; zero: no bound.
    pub timeout: Duration,
    /// Bounds the connecting of one attempt; zero: no bound.
    pub connect_timeout: Duration,
    /// Immediate extra attempts per endpoint.
    pub retry_limit: u8,
    /// How long a read waits for the backend altogether; zero: not beyond [`Backend::retry_limit`].
    pub demand_deadline: Duration,
    /// Whether certificates are left unchecked.
    pub skip_verify: bool,
    /// Further certificate authorities.
    pub ca_cert_files: Vec<PathBuf>,
    /// The way to the place.
    pub route: Route,
}

/// The place that blobs come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Files of this host.
    Localfs {
        /// The only blob, whatever its id.
        blob_file: Option<PathBuf>,
        /// Directory of blobs by id.
        dir: Option<PathBuf>,
        /// Further directories, searched in this order after `dir`.
        alt_dirs: Vec<PathBuf>,
    },
    /// Partitions of a disk.
    Localdisk {
        /// The disk, or its image file.
        device_path: Option<PathBuf>,
        /// The disk is one blob.
        disable_gpt: bool,
    },
    /// Alibaba's object store.
    Oss(Bucket),
    /// Amazon's, and what speaks like it.
    S3 {
        /// Region in signatures.
        region: String,
        /// The bucket.
        bucket: Bucket,
    },
    /// A container registry.
    Registry(Registry),
    /// A server that answers `HEAD` and `GET <path>/<blob id>`.
    HttpProxy {
        /// `http://`, `https://`, or the absolute path of a unix socket.
        addr: Endpoint,
        /// Path before the blob id.
        path: String,
    },
}

/// Scheme of a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheme {
    /// Left empty.
    #[default]
    Unstated,
    /// `http`.
    Http,
    /// `https`.
    Https,
}

choice!(Scheme { "http" => Http, "https" => Https, "" => Unstated });

/// A bucket of an object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// How to speak to it.
    pub scheme: Scheme,
    /// Host of the service.
    pub endpoint: Endpoint,
    /// Name of the bucket.
    pub name: String,
    /// Goes before the blob id.
    pub object_prefix: String,
    /// Empty: requests are not signed.
    pub access_key_id: Secret,
    /// See [`Bucket::access_key_id`].
    pub access_key_secret: Secret,
}

/// A repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// How to speak to it; unstated: to be found out.
    pub scheme: Scheme,
    /// `host[:port]`.
    pub host: Endpoint,
    /// `namespace/name`, without a tag.
    pub repo: String,
    /// base64 of `user:password`; checked on first use.
    pub auth: Secret,
    /// A bearer token.
    pub registry_token: Secret,
    /// Scheme of redirect targets, where it is to be another one.
    pub blob_url_scheme: Scheme,
    /// Host of redirect targets, where it is to be another one.
    pub blob_redirected_host: Endpoint,
}

/// The way to a place over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Straight.
    Direct,
    /// Through a proxy.
    Proxy(Proxy),
    /// Mirrors in this order, then the place itself.
    Mirrors(Vec<Mirror>),
}

/// A proxy, and how its health is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// The proxy.
    pub url: Endpoint,
    /// Answers while the proxy is well; empty: not asked.
    pub ping_url: Endpoint,
    /// Whether requests go straight while the proxy is not well.
    pub fallback: bool,
    /// Between two pings.
    pub check_interval: Duration,
    /// Targets are rewritten to plain HTTP before the proxy sees them.
    pub use_http: bool,
    /// Pings pause when nothing was asked for this long.
    pub check_pause_elapsed: Duration,
    /// Scheduler of the peer-to-peer client.
    pub dragonfly_scheduler_endpoint: Endpoint,
}

/// A mirror, and how its health is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// URL with scheme.
    pub host: Endpoint,
    /// Answers while the mirror is well; empty: `<host>/v2`.
    pub ping_url: Endpoint,
    /// Added to every request. Values may be credentials.
    pub headers: BTreeMap<String, Secret>,
    /// Between two pings of a mirror that is out of use.
    pub health_check_interval: Duration,
    /// Failures in a row that put it out of use.
    pub failure_limit: u8,
    /// Pings pause when nothing was asked for this long.
    pub health_check_pause_elapsed: Duration,
}

impl Backend {
    /// Name of the kind, as in the configuration.
    pub fn kind(&self) -> &'static str {
        match &self.source {
            Source::Localfs { .. } => "localfs",
            Source::Localdisk { .. } => "localdisk",
            Source::Oss(_) => "oss",
            Source::S3 { .. } => "s3",
            Source::Registry(_) => "registry",
            Source::HttpProxy { .. } => "http-proxy",
        }
    }

    /// The field without which no blob can be found, if it is not given. The samples leave such fields out.
    pub fn missing_field(&self) -> Option<&'static str> {
        let bucket = |bucket: &Bucket| bucket.name.is_empty().then_some("bucket_name");
        match &self.source {
            Source::Localfs { blob_file: None, dir: None, alt_dirs } if alt_dirs.is_empty() => {
                Some("dir` or `blob_file")
            }
            Source::Localdisk { device_path: None, .. } => Some("device_path"),
            Source::Oss(oss) if oss.endpoint.is_empty() => Some("endpoint"),
            Source::Oss(oss) => bucket(oss),
            Source::S3 { bucket: s3, .. } => bucket(s3),
            Source::Registry(registry) if registry.host.is_empty() => Some("host"),
            Source::Registry(registry) if registry.repo.is_empty() => Some("repo"),
            Source::HttpProxy { addr, .. } if addr.is_empty() => Some("addr"),
            _ => None,
        }
    }

    /// What the log says at start, in the documented form.
    pub fn common_config(&self) -> CommonConfig<'_> {
        CommonConfig(self)
    }
}

/// Shows what all backends know in the documented form: these fields in this order, URLs without user and query.
#[derive(Debug, Clone, Copy)]
pub struct CommonConfig<'a>(&'a Backend);

impl fmt::Display for CommonConfig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let none = Endpoint::default();
        let (url, ping_url, fallback, interval) = match &self.0.route {
            Route::Proxy(proxy) => (&proxy.url, &proxy.ping_url, proxy.fallback, proxy.check_interval.as_secs()),
            Route::Direct | Route::Mirrors(_) => (&none, &none, true, 5),
        };
        write!(
            f,
            "CommonConfig {{ proxy: ProxyConfig {{ url: {url:?}, ping_url: {ping_url:?}, fallback: {fallback}, \
             check_interval: {interval} }}, timeout: {}, connect_timeout: {}, retry_limit: {} }}",
            self.0.timeout.as_secs(),
            self.0.connect_timeout.as_secs(),
            self.0.retry_limit
        )
    }
}
