#!/bin/sh
# Runs a command that trusts the certificates in the build secret "ca", if there is one.
ca=/run/secrets/ca
if [ -s "$ca" ]; then
  export PIP_CERT="$ca" SSL_CERT_FILE="$ca" REQUESTS_CA_BUNDLE="$ca" CURL_CA_BUNDLE="$ca"
fi
exec "$@"
