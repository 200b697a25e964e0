"""Items on Django: no view handles the session.

    python examples/django_items.py

Needed, in a clone: ``pip install . Django waitress``; PORT and DATABASE_URL as in the others.
"""

import logging
import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from sessionscope import SessionMiddleware
from sqlalchemy import String, create_engine, orm, select
from waitress import serve

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///items.db"))
Session = orm.scoped_session(orm.sessionmaker(engine))


class Base(orm.DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str | None] = orm.mapped_column(String(16))

    def record(self) -> dict[str, object]:
        return {"id": self.id, "name": self.name}


def items(request: HttpRequest) -> JsonResponse:
    if request.method == "POST":
        item = Item()
        Session.add(item)
        Session.flush()  # the database assigns the id
        item.name = f"Item #{item.id}"
        return JsonResponse(item.record())
    found = Session.scalars(select(Item).order_by(Item.id))
    return JsonResponse({"items": [item.record() for item in found]})


def show(request: HttpRequest, id: int) -> JsonResponse:
    item = Session.get(Item, id)
    record = {"error": "not found"} if item is None else item.record()
    return JsonResponse(record, status=404 if item is None else 200)


urlpatterns = [path("", items), path("<int:id>", show)]
LENGTHS = "django.middleware.common.CommonMiddleware"  # so that a failed COMMIT is a clean 500
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1"], MIDDLEWARE=[LENGTHS])
Base.metadata.create_all(engine)
application = SessionMiddleware(get_wsgi_application(), Session)

if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)  # shows each commit and rollback
    serve(application, listen=f"127.0.0.1:{os.environ.get('PORT', '8080')}")
