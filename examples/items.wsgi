# The Flask example for Apache with mod_wsgi, which looks for "application" in this file:
#
#     WSGIDaemonProcess items threads=8 python-home=/srv/items/.venv
#     WSGIScriptAlias / /srv/items/examples/items.wsgi process-group=items application-group=%{GLOBAL}
#     <Directory /srv/items/examples>
#       Require all granted
#     </Directory>
#
# Apache neither runs in this folder nor imports from it.  Its user must be able to write here,
# unless DATABASE_URL names another database.

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, here)
os.environ.setdefault("DATABASE_URL", f"sqlite:///{here}/items.db")

from flask_items import application
